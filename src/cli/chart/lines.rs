//! Charts of lines: one panel per column, side by side, over the same x column.

use arrow::array::RecordBatch;
use plotters::prelude::*;

use super::columns;
use crate::failed::Failed;
use ovchat_pipeline::config::LineChart;

/// The size of a panel, in pixels.
const PANEL: (u32, u32) = (300, 220);

/// The maximum number of panels in a row.
const ACROSS: usize = 4;

const LINE: RGBColor = RGBColor(38, 108, 210);
const GRID: RGBColor = RGBColor(226, 228, 232);
const TEXT: RGBColor = RGBColor(60, 64, 72);

/// One column plotted over another.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    pub title: String,
    pub x: String,
    /// The points of all rows in which both columns have a value, from left to right.
    pub points: Vec<(f64, f64)>,
}

/// Returns the panels of a chart over the rows of its view. Fails if a column is not numeric.
pub fn panels(rows: &[RecordBatch], chart: &LineChart) -> Result<Vec<Panel>, Failed> {
    let xs = numbers(rows, &chart.x)?;
    let panel = |line: &String| {
        let points = xs.iter().zip(numbers(rows, line)?);
        let points = points.filter_map(|(x, y)| Some(((*x)?, y?)));
        let mut points: Vec<(f64, f64)> = points.collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        Ok(Panel {
            title: line.replace('_', " "),
            x: chart.x.clone(),
            points,
        })
    };
    chart.lines.iter().map(panel).collect()
}

fn numbers(rows: &[RecordBatch], name: &str) -> Result<Vec<Option<f64>>, Failed> {
    columns::numbers(rows, name)?.ok_or_else(|| columns::no_column(name))
}

/// Draws the panels as an SVG.
pub fn draw(panels: &[Panel]) -> Result<String, DrawingAreaErrorKind<std::io::Error>> {
    let across = panels.len().clamp(1, ACROSS);
    let down = panels.len().div_ceil(across).max(1);
    let size = (PANEL.0 * across as u32, PANEL.1 * down as u32);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, panel) in root.split_evenly((down, across)).iter().zip(panels) {
            draw_panel(area, panel)?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn draw_panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    panel: &Panel,
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let [x, y] = [0, 1].map(|axis| {
        let values = panel.points.iter().map(|point| [point.0, point.1][axis]);
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        if low > high {
            return 0.0..1.0;
        }
        let room = [0.03, 0.15][axis] * (high - low).max(1e-3 * high.abs()).max(1e-9);
        low - room..high + room
    });
    // Whole numbers, such as rounds, get one label each.
    let is_whole = panel.points.iter().all(|(x, _)| x.fract() == 0.0);
    let marks = if is_whole {
        ((x.end - x.start) as usize + 1).min(10)
    } else {
        5
    };
    let label = |number: &f64| {
        let text = format!("{number:.3}");
        let text = text.trim_end_matches('0').trim_end_matches('.');
        if text == "-0" { "0" } else { text }.to_owned()
    };
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 15).into_font().color(&TEXT))
        .margin(10)
        .margin_right(18)
        .x_label_area_size(32)
        .y_label_area_size(46)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(GRID)
        .label_style(("sans-serif", 12).into_font().color(&TEXT))
        .x_labels(marks)
        .y_labels(5)
        .x_label_formatter(&label)
        .y_label_formatter(&label)
        .x_desc(&panel.x)
        .draw()?;
    let points = panel.points.iter().copied();
    chart.draw_series(LineSeries::new(points.clone(), LINE.stroke_width(2)))?;
    chart.draw_series(points.map(|point| Circle::new(point, 4, LINE.filled())))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Float32Array, Int32Array, StringArray};

    use super::*;

    fn rows() -> RecordBatch {
        let round: ArrayRef = Arc::new(Int32Array::from(vec![2, 1, 0]));
        let reward: ArrayRef = Arc::new(Float32Array::from(vec![Some(1.5), None, Some(-0.5)]));
        let word: ArrayRef = Arc::new(StringArray::from(vec!["a", "b", "c"]));
        RecordBatch::try_from_iter([("round", round), ("mean_reward", reward), ("word", word)])
            .unwrap()
    }

    fn chart(line: &str) -> LineChart {
        LineChart {
            x: "round".to_owned(),
            lines: vec![line.to_owned()],
        }
    }

    #[test]
    fn a_panel_has_the_points_that_there_are() {
        let panels = panels(&[rows()], &chart("mean_reward")).unwrap();
        assert_eq!(panels[0].points, [(0.0, -0.5), (2.0, 1.5)]);
        let svg = draw(&panels).unwrap();
        assert!(
            svg.starts_with("<svg") && svg.contains("mean reward"),
            "{svg}"
        );
        assert_eq!(svg.matches("<circle").count(), 2);
    }

    #[test]
    fn what_is_no_number_is_not_drawn() {
        let Err(Failed::Words(problem)) = panels(&[rows()], &chart("word")) else {
            panic!("a text column is not numeric");
        };
        assert_eq!(problem, "the chart's column `word` is not numeric");
    }

    #[test]
    fn a_view_without_rows_is_an_empty_panel() {
        let panel = Panel {
            title: "nothing".to_owned(),
            x: "round".to_owned(),
            points: Vec::new(),
        };
        assert!(draw(&[panel]).unwrap().contains("nothing"));
    }
}

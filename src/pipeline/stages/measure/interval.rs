//! The standard error and the confidence interval of a mean over clustered items.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// The least number of clusters for which an interval is given.
const CLUSTERS_MIN: usize = 10;

/// The probability below the upper end of the interval.
const UPPER: f64 = 0.975;

/// The uncertainty of a mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Uncertainty {
    /// The standard error; `None` for a single cluster.
    pub se: Option<f64>,
    /// Half the width of the 95 % confidence interval; `None` below 10 clusters.
    pub half_width: Option<f64>,
    pub clusters: usize,
}

/// Returns the uncertainty of the mean of `values`, which belong to the clusters 0 to `clusters` - 1.
///
/// With n values e in G clusters, and g the sum of e − mean(e) over a cluster, the standard error is
/// sqrt(G / (G − 1) · Σ g²) / n: the cluster-robust variance of a mean (Liang and Zeger, 1986) with the
/// usual correction for few clusters. The interval takes the t distribution with G − 1 degrees of freedom.
pub fn uncertainty(values: &[f64], clusters_of: &[usize], clusters: usize) -> Uncertainty {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let mut sums = vec![0.0; clusters];
    for (value, &cluster) in values.iter().zip(clusters_of) {
        sums[cluster] += value - mean;
    }
    let squares: f64 = sums.iter().map(|sum| sum * sum).sum();
    let groups = clusters as f64;
    let se = (clusters > 1).then(|| (groups / (groups - 1.0) * squares).sqrt() / count);
    let t = || {
        let t = StudentsT::new(0.0, 1.0, groups - 1.0).expect("one degree of freedom or more");
        t.inverse_cdf(UPPER)
    };
    let half_width = se.filter(|_| clusters >= CLUSTERS_MIN).map(|se| se * t());
    Uncertainty {
        se,
        half_width,
        clusters,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_that_of_the_formula() {
        // By hand: mean 3, cluster sums (1 - 3) + (2 - 3) = -3 and (6 - 3) = 3.
        let found = uncertainty(&[1.0, 2.0, 6.0], &[0, 0, 1], 2);
        let se = (2.0_f64 * 18.0).sqrt() / 3.0;
        assert!((found.se.unwrap() - se).abs() < 1e-12);
        assert_eq!((found.half_width, found.clusters), (None, 2));
        assert_eq!(uncertainty(&[1.0, 2.0], &[0, 0], 1).se, None);
        // Clusters of one item: the usual standard error. t(9) is 2.262157.
        let values: Vec<f64> = (0..10).map(f64::from).collect();
        let own: Vec<usize> = (0..10).collect();
        let found = uncertainty(&values, &own, 10);
        let usual = (82.5_f64 / 9.0).sqrt() / 10_f64.sqrt();
        assert!((found.se.unwrap() - usual).abs() < 1e-12);
        assert!((found.half_width.unwrap() / usual - 2.262_157).abs() < 1e-5);
    }

    /// A small generator of uniform numbers (splitmix64), and of normal ones.
    struct Draws(u64);

    impl Draws {
        fn uniform(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
        }

        fn normal(&mut self) -> f64 {
            let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
            radius * (2.0 * std::f64::consts::PI * self.uniform()).cos()
        }
    }

    /// 60 questions about 24 images, as in LLaVA-Bench, whose gains depend on the image.
    #[test]
    fn the_interval_covers_the_truth_as_often_as_it_says() {
        let mut draws = Draws(7);
        let clusters_of: Vec<usize> = (0..60).map(|item| item * 24 / 60).collect();
        let trials = 4000;
        let mut covered = 0;
        let mut covered_alone = 0;
        for _ in 0..trials {
            let of_image: Vec<f64> = (0..24).map(|_| draws.normal()).collect();
            let value = |cluster: &usize, draws: &mut Draws| of_image[*cluster] + draws.normal();
            let values: Vec<f64> = clusters_of
                .iter()
                .map(|cluster| value(cluster, &mut draws))
                .collect();
            let mean = values.iter().sum::<f64>() / 60.0;
            let found = uncertainty(&values, &clusters_of, 24);
            covered += u32::from(mean.abs() <= found.half_width.unwrap());
            let own: Vec<usize> = (0..60).collect();
            let alone = uncertainty(&values, &own, 60);
            covered_alone += u32::from(mean.abs() <= alone.half_width.unwrap());
        }
        let share = f64::from(covered) / f64::from(trials);
        assert!((0.935..0.965).contains(&share), "{share}");
        // Items taken as independent would promise too much.
        assert!(f64::from(covered_alone) / f64::from(trials) < 0.9);
    }
}

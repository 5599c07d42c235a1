//! Decoding of image files to RGB, up to a limit of pixels.
//!
//! Pixels are those of Pillow's `Image.open(file).convert("RGB")`, which the reference programs
//! call: alpha is dropped, not blended; palettes are looked up, including transparent entries;
//! 16-bit color keeps the high byte, while 16-bit gray is clipped at 255 (Pillow's mode `I;16`);
//! EXIF rotation is not applied. JPEG is decoded with the library that Pillow itself uses
//! (libjpeg-turbo, here in Mozilla's edition), because decoders differ in how they round colors.
//! Lossy WebP is decoded by a different library than Pillow's.

use std::io::{Cursor, ErrorKind};
use std::panic::catch_unwind;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{
    DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder as _, ImageError, ImageFormat,
    ImageReader, Limits,
};
use mozjpeg::ColorSpace;

use crate::RowFault;

/// Maximum number of pixels of an image: the size at which Pillow itself refuses (twice its
/// `MAX_IMAGE_PIXELS`). As RGB this takes 512 MiB.
pub const PIXELS_MAX: u64 = 178_956_970;

/// A decoded image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    pub width: usize,
    pub height: usize,
    /// The pixels: `height * width * 3` bytes, row by row, in the order red, green, blue.
    pub data: Vec<u8>,
}

impl Rgb {
    /// Creates an image of one color.
    pub fn filled(width: usize, height: usize, color: [u8; 3]) -> Self {
        let data = color.repeat(width * height);
        Self {
            width,
            height,
            data,
        }
    }

    /// Returns the image as a JPEG file, with a quality from 1 to 100.
    ///
    /// # Errors
    ///
    /// Fails if the image is too large for a JPEG file.
    pub fn to_jpeg(&self, quality: u8) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let (width, height) = (self.width as u32, self.height as u32);
        JpegEncoder::new_with_quality(&mut bytes, quality)
            .write_image(&self.data, width, height, ExtendedColorType::Rgb8)
            .map_err(|error| format!("cannot write a JPEG file: {error}"))?;
        Ok(bytes)
    }

    /// Returns the image as a PNG file.
    ///
    /// # Errors
    ///
    /// Fails if the image is too large for a PNG file.
    pub fn to_png(&self) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let encoder =
            PngEncoder::new_with_quality(&mut bytes, CompressionType::Fast, FilterType::Adaptive);
        let (width, height) = (self.width as u32, self.height as u32);
        encoder
            .write_image(&self.data, width, height, ExtendedColorType::Rgb8)
            .map_err(|error| format!("cannot write a PNG file: {error}"))?;
        Ok(bytes)
    }

    /// Copies `image` into this one, with its upper left corner at column `left`, row `top`.
    ///
    /// # Panics
    ///
    /// Panics if it does not fit.
    pub fn paste(&mut self, image: &Self, left: usize, top: usize) {
        assert!(left + image.width <= self.width, "too wide to paste");
        let rows = self.data.chunks_exact_mut(3 * self.width).skip(top);
        let source = image.data.chunks_exact(3 * image.width);
        assert!(rows.len() >= source.len(), "too high to paste");
        for (row, source) in rows.zip(source) {
            row[3 * left..][..source.len()].copy_from_slice(source);
        }
    }

    /// Writes `side` x `side` pixels, starting at column `left`, row `top`, to `planes` as `[3,
    /// side, side]` floats; `levels` maps each level of each channel to its value.
    ///
    /// # Panics
    ///
    /// Panics if the square extends beyond the image.
    pub fn planes(
        &self,
        left: usize,
        top: usize,
        side: usize,
        levels: &[[f32; 256]; 3],
        planes: &mut [f32],
    ) {
        let (red, rest) = planes.split_at_mut(side * side);
        let (green, blue) = rest.split_at_mut(side * side);
        let rows = red
            .chunks_exact_mut(side)
            .zip(green.chunks_exact_mut(side))
            .zip(blue.chunks_exact_mut(side));
        for (row, ((red, green), blue)) in (top..).zip(rows) {
            let row = &self.data[3 * (row * self.width + left)..][..3 * side];
            let places = red.iter_mut().zip(green).zip(blue);
            for (pixel, ((red, green), blue)) in row.chunks_exact(3).zip(places) {
                *red = levels[0][usize::from(pixel[0])];
                *green = levels[1][usize::from(pixel[1])];
                *blue = levels[2][usize::from(pixel[2])];
            }
        }
    }

    /// Pads to a square with `background`, centering the image (half a pixel up or left if the rest
    /// is odd).
    #[must_use]
    pub fn squared(self, background: [u8; 3]) -> Self {
        if self.width == self.height {
            return self;
        }
        let side = self.width.max(self.height);
        let mut square = Self::filled(side, side, background);
        square.paste(&self, (side - self.width) / 2, (side - self.height) / 2);
        square
    }
}

/// The header of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Width, in pixels.
    pub width: usize,
    /// Height, in pixels.
    pub height: usize,
    /// The format, by content: `png`, `jpeg`, `webp`, `gif`, `bmp`, `tiff` or `pnm`.
    pub format: &'static str,
}

/// Reads the header of an image file, and rejects an image of more than [`PIXELS_MAX`] pixels.
pub fn probe(bytes: &[u8]) -> Result<Probe, RowFault> {
    open(bytes, PIXELS_MAX).map(|(probe, _)| probe)
}

/// Decodes an image file if it has at most `pixels_max` pixels by its header.
///
/// A truncated file is rejected, even if most of the image could be shown.
pub fn decode(bytes: &[u8], pixels_max: u64) -> Result<Rgb, RowFault> {
    let (probe, decoder) = open(bytes, pixels_max)?;
    let whole = match probe.format {
        "jpeg" => jpeg_is_whole(bytes),
        "webp" => webp_is_whole(bytes),
        _ => true,
    };
    if !whole {
        return Err(RowFault("truncated image file".to_owned()));
    }
    if probe.format == "jpeg" {
        return Ok(Rgb {
            width: probe.width,
            height: probe.height,
            data: decode_jpeg(bytes)?,
        });
    }
    let image = DynamicImage::from_decoder(decoder).map_err(|error| fault(&error))?;
    let data = match image {
        DynamicImage::ImageRgb8(rgb) => rgb.into_raw(),
        DynamicImage::ImageRgba8(rgba) => first_three(&rgba, 4, |level| level),
        DynamicImage::ImageLuma8(gray) => gray_to_rgb(&gray, 1, |level| level),
        DynamicImage::ImageLumaA8(gray) => gray_to_rgb(&gray, 2, |level| level),
        DynamicImage::ImageRgb16(rgb) => first_three(&rgb, 3, high_byte),
        DynamicImage::ImageRgba16(rgba) => first_three(&rgba, 4, high_byte),
        DynamicImage::ImageLuma16(gray) => gray_to_rgb(&gray, 1, |level: u16| level.min(255) as u8),
        DynamicImage::ImageLumaA16(gray) => gray_to_rgb(&gray, 2, high_byte),
        // Casts of floats truncate and clip, as in Pillow's mode `F`.
        DynamicImage::ImageRgb32F(rgb) => first_three(&rgb, 3, |level: f32| level as u8),
        DynamicImage::ImageRgba32F(rgba) => first_three(&rgba, 4, |level: f32| level as u8),
        _ => return Err(RowFault("unsupported pixel format".to_owned())),
    };
    Ok(Rgb {
        width: probe.width,
        height: probe.height,
        data,
    })
}

/// Opens a decoder and reads the header.
fn open(bytes: &[u8], pixels_max: u64) -> Result<(Probe, impl ImageDecoder), RowFault> {
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .expect("memory can be read");
    let format = match reader.format() {
        Some(ImageFormat::Png) => "png",
        Some(ImageFormat::Jpeg) => "jpeg",
        Some(ImageFormat::WebP) => "webp",
        Some(ImageFormat::Gif) => "gif",
        Some(ImageFormat::Bmp) => "bmp",
        Some(ImageFormat::Tiff) => "tiff",
        Some(ImageFormat::Pnm) => "pnm",
        _ => {
            let problem = if bytes.is_empty() {
                "the file is empty"
            } else {
                "not an image"
            };
            let known = "expected png, jpeg, webp, gif, bmp, tiff or pnm";
            return Err(RowFault(format!("{problem} ({known})")));
        }
    };
    // The header is checked below; this limits what a decoder allocates in addition, such as
    // profiles.
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(8 * pixels_max + (64 << 20));
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|error| fault(&error))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(RowFault(format!(
            "the image has no pixels ({width} x {height})"
        )));
    }
    if u64::from(width) * u64::from(height) > pixels_max {
        let problem =
            format!("the image has {width} x {height} pixels, more than the limit of {pixels_max}");
        return Err(RowFault(format!("{problem}; scale it down")));
    }
    let probe = Probe {
        width: width as usize,
        height: height as usize,
        format,
    };
    Ok((probe, decoder))
}

/// Decodes a JPEG to RGB.
fn decode_jpeg(bytes: &[u8]) -> Result<Vec<u8>, RowFault> {
    let decode = || -> std::io::Result<Vec<u8>> {
        let jpeg = mozjpeg::Decompress::new_mem(bytes)?;
        match jpeg.color_space() {
            ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK => {
                let mut lines = jpeg.to_colorspace(ColorSpace::JCS_CMYK)?;
                let inks: Vec<[u8; 4]> = lines.read_scanlines()?;
                lines.finish()?;
                Ok(inks.into_iter().flat_map(inks_to_rgb).collect())
            }
            _ => {
                let mut lines = jpeg.rgb()?;
                let pixels: Vec<[u8; 3]> = lines.read_scanlines()?;
                lines.finish()?;
                Ok(pixels.into_flattened())
            }
        }
    };
    // The library reports errors by unwinding through its C code.
    let decoded = catch_unwind(decode).unwrap_or_else(|panic| {
        let problem = panic.downcast::<String>();
        Err(std::io::Error::other(
            problem.map_or_else(|_| String::new(), |text| *text),
        ))
    });
    decoded.map_err(|error| RowFault(format!("truncated or corrupt image file: {error}")))
}

/// Converts cyan, magenta, yellow and black as stored in JPEG files (Adobe's convention, 255 for no
/// ink) as Pillow does (`src/libImaging/Convert.c`, `cmyk2rgb`).
fn inks_to_rgb([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    [cyan, magenta, yellow].map(|ink| {
        let product = (255 - u32::from(ink)) * u32::from(black) + 128;
        black - (((product >> 8) + product) >> 8) as u8
    })
}

/// Summarizes a decoder's error in one line.
fn fault(error: &ImageError) -> RowFault {
    RowFault(match error {
        ImageError::IoError(io) if io.kind() == ErrorKind::UnexpectedEof => {
            "truncated image file".to_owned()
        }
        ImageError::Unsupported(_) => format!("cannot decode the image: {error}"),
        _ => format!("truncated or corrupt image file: {error}"),
    })
}

/// Returns the first three of every `step` samples.
fn first_three<S: Copy>(samples: &[S], step: usize, level: impl Fn(S) -> u8) -> Vec<u8> {
    let pixels = samples.chunks_exact(step);
    pixels
        .flat_map(|pixel| [level(pixel[0]), level(pixel[1]), level(pixel[2])])
        .collect()
}

/// Returns the first of every `step` samples, three times.
fn gray_to_rgb<S: Copy>(samples: &[S], step: usize, level: impl Fn(S) -> u8) -> Vec<u8> {
    let pixels = samples.iter().step_by(step);
    pixels.flat_map(|&sample| [level(sample); 3]).collect()
}

fn high_byte(level: u16) -> u8 {
    (level >> 8) as u8
}

/// True if a JPEG is complete up to its end marker. Decoders silently fill missing data with gray,
/// so the segments are walked here: each declares its length, and the coded data after a start of
/// scan continues to the first marker that is neither a stuffed zero nor a restart.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(found) = bytes.get(at..).and_then(|rest| position(rest, 0xFF)) {
        at += found + 1;
        match bytes.get(at..) {
            Some([0xD9, ..]) => return true,
            // A stuffed zero, a restart, a second start of image.
            Some([0x00 | 0x01 | 0xD0..=0xD8, ..]) => at += 1,
            // Fill bytes before a marker.
            Some([0xFF, ..]) => {}
            Some([_, high, low, ..]) => at += 1 + usize::from(u16::from_be_bytes([*high, *low])),
            _ => return false,
        }
    }
    false
}

/// True if a WebP is as long as its RIFF header declares; its decoder fills in a few missing bytes.
fn webp_is_whole(bytes: &[u8]) -> bool {
    let length = bytes.get(4..8).and_then(|length| length.try_into().ok());
    length.is_some_and(|length| bytes.len() as u64 >= 8 + u64::from(u32::from_le_bytes(length)))
}

/// Returns the index of the first `wanted`.
fn position(bytes: &[u8], wanted: u8) -> Option<usize> {
    bytes.iter().position(|&byte| byte == wanted)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{GrayAlphaImage, GrayImage, ImageBuffer, Luma, Rgb as Color, RgbImage, RgbaImage};

    use super::*;

    fn file(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image
            .into()
            .write_to(&mut bytes, format)
            .expect("written to memory");
        bytes.into_inner()
    }

    fn photograph() -> RgbImage {
        RgbImage::from_fn(64, 48, |x, y| {
            image::Rgb([(4 * x) as u8, (5 * y) as u8, (x * y) as u8])
        })
    }

    fn pixels(bytes: &[u8]) -> Vec<u8> {
        decode(bytes, PIXELS_MAX).expect("an image").data
    }

    fn diagnostic(bytes: &[u8], pixels_max: u64) -> String {
        decode(bytes, pixels_max).expect_err("refused").0
    }

    #[test]
    fn alpha_is_dropped_not_blended() {
        let rgba = RgbaImage::from_raw(2, 1, vec![10, 20, 30, 0, 40, 50, 60, 128]).unwrap();
        assert_eq!(
            pixels(&file(rgba, ImageFormat::Png)),
            [10, 20, 30, 40, 50, 60]
        );
        let gray = GrayAlphaImage::from_raw(2, 1, vec![10, 0, 200, 255]).unwrap();
        assert_eq!(
            pixels(&file(gray, ImageFormat::Png)),
            [10, 10, 10, 200, 200, 200]
        );
    }

    #[test]
    fn gray_is_repeated() {
        let gray = GrayImage::from_raw(2, 1, vec![0, 77]).unwrap();
        assert_eq!(pixels(&file(gray, ImageFormat::Png)), [0, 0, 0, 77, 77, 77]);
    }

    #[test]
    fn sixteen_bit_gray_is_clipped_and_sixteen_bit_color_keeps_the_high_byte() {
        let gray: ImageBuffer<Luma<u16>, _> =
            ImageBuffer::from_raw(3, 1, vec![100_u16, 255, 4369]).unwrap();
        assert_eq!(
            pixels(&file(gray, ImageFormat::Png)),
            [100, 100, 100, 255, 255, 255, 255, 255, 255]
        );
        let color: ImageBuffer<Color<u16>, _> =
            ImageBuffer::from_raw(1, 1, vec![0x00FF_u16, 0x0100, 0xFFFF]).unwrap();
        assert_eq!(pixels(&file(color, ImageFormat::Png)), [0, 1, 255]);
    }

    #[test]
    fn the_header_tells_size_and_format_by_content() {
        let formats = [
            (ImageFormat::Png, "png"),
            (ImageFormat::Jpeg, "jpeg"),
            (ImageFormat::WebP, "webp"),
            (ImageFormat::Gif, "gif"),
            (ImageFormat::Bmp, "bmp"),
            (ImageFormat::Tiff, "tiff"),
            (ImageFormat::Pnm, "pnm"),
        ];
        for (format, name) in formats {
            let found = probe(&file(photograph(), format)).expect("an image");
            let (width, height) = (found.width, found.height);
            assert_eq!((width, height, found.format), (64, 48, name));
        }
    }

    #[test]
    fn a_truncated_file_is_refused_in_every_format() {
        for format in [
            ImageFormat::Png,
            ImageFormat::Jpeg,
            ImageFormat::WebP,
            ImageFormat::Gif,
            ImageFormat::Bmp,
            ImageFormat::Tiff,
            ImageFormat::Pnm,
        ] {
            let whole = file(photograph(), format);
            assert!(decode(&whole, PIXELS_MAX).is_ok(), "{format:?}");
            let truncated = diagnostic(&whole[..whole.len() * 7 / 10], PIXELS_MAX);
            assert!(truncated.contains("truncated"), "{format:?}: {truncated}");
        }
    }

    #[test]
    fn a_jpeg_without_its_end_is_refused() {
        let whole = file(photograph(), ImageFormat::Jpeg);
        assert!(diagnostic(&whole[..whole.len() - 2], PIXELS_MAX).contains("truncated"));
    }

    #[test]
    fn the_end_of_a_thumbnail_is_not_the_end_of_its_jpeg() {
        let mut bytes = file(photograph(), ImageFormat::Jpeg);
        // An application segment that contains an end marker, as EXIF thumbnails do.
        bytes.splice(2..2, [0xFF, 0xE1, 0x00, 0x06, 0xFF, 0xD9, 0x00, 0x00]);
        assert!(decode(&bytes, PIXELS_MAX).is_ok());
        bytes.truncate(bytes.len() - 2);
        assert!(decode(&bytes, PIXELS_MAX).is_err());
    }

    #[test]
    fn what_is_not_a_image_is_said_to_be_none() {
        assert!(diagnostic(b"hello, this is text", PIXELS_MAX).contains("not an image"));
        assert!(diagnostic(b"", PIXELS_MAX).contains("the file is empty"));
    }

    #[test]
    fn a_image_beyond_the_bound_is_refused_by_its_header() {
        let whole = file(photograph(), ImageFormat::Png);
        // Only the header is left, so decoding would fail with a different error.
        let header = &whole[..60];
        assert!(diagnostic(header, 64 * 48 - 1).contains("64 x 48 pixels, more than the limit"));
        assert!(decode(&whole, 64 * 48).is_ok());
    }
}

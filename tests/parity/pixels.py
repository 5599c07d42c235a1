"""Pictures of many sizes and kinds, and the pixels that the processors of both models make of them."""
import io

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor

import llava
import onevision
from common import error, folder, picture, save, seeded, write_json

SIDE = onevision.SIDE
CLIP_SIDE = 14
# Width and height: single pixels, odd and even, tiles and their neighbors, extreme, larger than any resolution.
SIZES = [(1, 1), (2, 1), (1, 7), (3, 3), (5, 4), (11, 12), (12, 12), (13, 12), (12, 13), (24, 36), (25, 36), (37, 36),
         (61, 40), (100, 99), (99, 100), (72, 72), (73, 73), (150, 10), (10, 150), (2, 300), (300, 2), (47, 423),
         (2305, 3), (3, 2400), (2310, 40), (640, 48)]
KINDS = ["L", "LA", "RGBA", "P", "PA", "1", "I;16"]
FORMATS = ["bmp", "gif", "tiff", "webp", "ppm"]
JPEGS = [dict(quality=95, subsampling=0), dict(quality=90, subsampling=2), dict(quality=75, subsampling=1),
         dict(quality=80, progressive=True), dict(quality=90, mode="L"), dict(quality=90, mode="CMYK"),
         dict(quality=90, rotated=True)]


def cases(random):
    """Name, bytes, and whether the format loses nothing."""
    def packed(image, form, **how):
        out = io.BytesIO()
        image.save(out, form, **how)
        return out.getvalue()

    for width, height in SIZES:
        yield f"{width}x{height}.png", packed(picture(random, width, height), "png"), True
    for _ in range(12):
        width, height = (int(n) for n in random.randint(1, 90, 2))
        yield f"{width}x{height}-random.png", packed(picture(random, width, height), "png"), True
    for mode in KINDS:
        for width, height in [(31, 22), (9, 40)]:
            name = mode.replace(";", "")
            yield f"{name}-{width}x{height}.png", packed(picture(random, width, height, mode), "png"), True
    yield "RGB16-20x30.png", png16(random, 20, 30), True
    for form in FORMATS:
        how = {"lossless": True} if form == "webp" else {}
        yield f"33x20.{form}", packed(picture(random, 33, 20, "P" if form == "gif" else "RGB"), form, **how), True
    for number, how in enumerate(JPEGS):
        how = dict(how)
        image = picture(random, 64, 41, how.pop("mode", "RGB"))
        if how.pop("rotated", False):
            exif = Image.Exif()
            exif[0x0112] = 6  # a viewer would turn it
            how["exif"] = exif
        yield f"{number}.jpg", packed(image, "jpeg", **how), False


def png16(random, width, height):
    """A PNG with 16 bits in each of three channels, which Pillow reads and does not write."""
    import struct
    import zlib
    rows = random.randint(0, 65536, (height, width, 3)).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def squared(image, color):
    """LLaVA's padding to a square."""
    side = max(image.size)
    out = Image.new("RGB", (side, side), color)
    shift = 1 if error("a square padded a pixel off the middle") and image.width != image.height else 0
    out.paste(image, ((side - image.width) // 2, (side - image.height) // 2 + shift))
    return out


def record():
    random = seeded("pixels")
    path, _, processor = onevision.make(random, "pixels", layout="C", grid=6, anyres=9)
    place = folder("pixels")
    # The judge's pictures go through the default processor (torchvision), the policy's through Pillow's.
    sizes = dict(size={"shortest_edge": CLIP_SIDE}, crop_size={"height": CLIP_SIDE, "width": CLIP_SIDE})
    clip = CLIPImageProcessor(**sizes)
    listed, expected = [], {}
    for index, (name, content, lossless) in enumerate(cases(random)):
        (place / name).write_bytes(content)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        one = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
        several = processor.image_processor(images=[[image, image]], return_tensors="pt")["pixel_values"]
        color = tuple(int(255 * mean) for mean in clip.image_mean)
        judged = clip(squared(image, color), return_tensors="pt")["pixel_values"][0]
        mean, std = (torch.tensor(values)[:, None, None] for values in (clip.image_mean, clip.image_std))
        expected |= {f"one.{index}": gray_levels(one, 0.5, 0.5), f"judge.{index}": gray_levels(judged, mean, std),
                     f"several.{index}": gray_levels(several.flatten(0, 1)[0], 0.5, 0.5)}
        listed.append(dict(file=name, lossless=lossless))
    # All levels of all channels, untouched by resizing, as floats.
    ramp = np.arange(2 * SIDE * SIDE * 3).reshape(2, SIDE, SIDE, 3) % 256
    for number, levels in enumerate(ramp.astype(np.uint8)):
        image = Image.fromarray(levels)
        image.save(place / f"ramp-{number}.png")
        expected[f"floats.{number}"] = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    clip_ramp = (np.arange(2 * CLIP_SIDE * CLIP_SIDE * 3).reshape(2, CLIP_SIDE, CLIP_SIDE, 3) % 256).astype(np.uint8)
    for number, levels in enumerate(clip_ramp):
        Image.fromarray(levels).save(place / f"clip-ramp-{number}.png")
        expected[f"clip_floats.{number}"] = clip(Image.fromarray(levels), return_tensors="pt")["pixel_values"][0]
    clip.save_pretrained(folder("pixels", "clip"))
    write_json(place / "cases.json", listed)
    save(place / "expected.safetensors", expected)
    record_llava(random, place, listed)


def gray_levels(pixels, mean, std):
    return ((pixels * std + mean) * 255).round().to(torch.uint8)


def record_llava(random, place, listed):
    """The pixels that LLaVA-1.5's processor makes of the same pictures, for each of its configurations."""
    folders, expected = [], {}
    for number, how in enumerate(llava.CONFIGURATIONS.values()):
        path, _, processor = llava.make(random, f"pixels {number}", **how | dict(shards=1))
        (path / "model.safetensors").unlink()
        folders.append(path.name)
        images = processor.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
        see = lambda file: images(Image.open(place / file).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        expected |= {f"{number}.{index}": gray_levels(see(case["file"]), mean, std) for index, case in enumerate(listed)}
        if processor.image_processor.size["shortest_edge"] == CLIP_SIDE:
            expected |= {f"floats.{part}": see(f"clip-ramp-{part}.png") for part in range(2)}
    save(folder("llava", "pixels") / "expected.safetensors", expected)
    write_json(folder("llava", "pixels") / "cases.json", folders)

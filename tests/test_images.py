"""Images of every kind and condition: RGB, or a ValueError with one line; never from outside the dataset."""

import csv
import os
import struct
import subprocess
import sys
import time
import unicodedata
import zlib

import numpy as np
import pytest
from helpers import ROOT, small_dataset, write_dataset, write_table
from PIL import Image

from lib.results.pictures import picture
from lib.tables.images import load_image, read_pictures, write_skipped
from lib.tables.raw import RawTables

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def refused(root, path):
    with pytest.raises(ValueError) as caught:
        load_image(root, path)
    line = str(caught.value)
    assert line.strip() and "\n" not in line
    return line


def loaded(root, path):
    image = load_image(root, path)
    assert image.mode == "RGB"
    return np.asarray(image)


def gradient(mode="RGB", size=(40, 30)):
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    rgb = np.stack([x * 255 // size[0], y * 255 // size[1], np.full_like(x, 60)], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def png(width, height, data=b"", colour_type=2):
    """A PNG file with a header of any size."""
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_truncated_at_many_places(tmp_path, kind):
    gradient().save(tmp_path / "whole", kind)
    raw = (tmp_path / "whole").read_bytes()
    for size in np.linspace(0, len(raw) * 0.6, 12).astype(int):
        (tmp_path / "cut").write_bytes(raw[:size])
        try:
            assert loaded(tmp_path, "cut").shape == (
                30,
                40,
                3,
            )  # a format may end early and still hold an image
        except ValueError as e:
            assert size < len(raw) and "\n" not in str(e)
    assert "cut" not in refused(tmp_path, "absent")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"this is text, no image",
        b"<svg></svg>",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        bytes(range(256)) * 40,
    ],
    ids=repr,
)
def test_no_image_at_all(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path, "a.png")


def test_missing_file_folder_and_odd_names(tmp_path):
    assert refused(tmp_path, "nowhere.png") == "no such file"
    (tmp_path / "folder").mkdir()
    for path in ("folder", ".", "a\x00b.png", "x" * 5_000, "nowhere/" * 40 + "a.png"):
        refused(tmp_path, path)


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1), (0, 0)])
def test_huge_or_empty_header_is_refused_before_it_is_decoded(tmp_path, size):
    (tmp_path / "huge.png").write_bytes(png(*size, zlib.compress(bytes(100))))
    line = refused(tmp_path, "huge.png")
    if size == (50_000, 50_000):
        assert "2500000000 pixels" in line


def test_huge_header_is_refused_from_every_thread(tmp_path):
    """Images are loaded by a pool of threads, and Python's warning filters belong to the process."""
    from concurrent.futures import ThreadPoolExecutor

    (tmp_path / "large.png").write_bytes(
        png(10_000, 10_000, zlib.compress(bytes(10_000 * 30_001), 1))
    )  # whole: only its size speaks against it
    gradient().save(tmp_path / "small.png")
    with ThreadPoolExecutor(8) as pool:
        lines = list(
            pool.map(
                lambda i: refused(tmp_path, "large.png") if i % 2 else loaded(tmp_path, "small.png"),
                range(40),
            )
        )
    assert all("pixels" in line for line in lines[1::2])


def test_cmyk(tmp_path):
    gradient("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(loaded(tmp_path, "a.jpg").astype(int) - np.asarray(gradient())).mean() < 6


def test_palette(tmp_path):
    gradient("P").save(tmp_path / "a.png")
    assert np.abs(loaded(tmp_path, "a.png").astype(int) - np.asarray(gradient("P").convert("RGB"))).max() == 0


def test_transparency_becomes_white(tmp_path):
    rgba = np.zeros((10, 10, 4), np.uint8)
    rgba[:5] = [200, 0, 0, 255]
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.paste(1, (0, 5, 10, 10))
    palette.save(tmp_path / "palette.png", transparency=1)
    grey = Image.new("LA", (10, 10), (200, 255))
    grey.putpixel((0, 9), (0, 0))
    grey.save(tmp_path / "grey.png")
    for name in ("rgba.png", "palette.png"):
        pixels = loaded(tmp_path, name)
        assert (pixels[:5] == [200, 0, 0]).all() and (pixels[5:] == 255).all()
    assert (loaded(tmp_path, "grey.png")[9, 0] == 255).all() and (
        loaded(tmp_path, "grey.png")[0, 0] == 200
    ).all()


def test_16_bit_keeps_its_shades(tmp_path):
    values = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    grey = loaded(tmp_path, "a.png")[..., 0].ravel()
    assert (
        (np.diff(grey.astype(int)) >= 0).all()
        and grey[0] == 0
        and grey[-1] == 255
        and len(set(grey.tolist())) > 200
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I", "F", "YCbCr", "LAB", "HSV"])
def test_other_modes(tmp_path, mode):
    gradient("L").convert("RGB").convert(mode).save(tmp_path / "a.tif") if mode in (
        "YCbCr",
        "LAB",
    ) else gradient("L").convert(mode if mode != "HSV" else "RGB").save(tmp_path / "a.tif")
    assert loaded(tmp_path, "a.tif").shape == (30, 40, 3)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5])
def test_floats_that_are_not_numbers_are_black(tmp_path, odd, place):
    """The others are scaled by the range of the finite ones."""
    values = np.linspace(0, 1_000, 16, dtype=np.float32)
    values[place] = odd
    Image.fromarray(values.reshape(4, 4)).save(tmp_path / "a.tif")
    grey = loaded(tmp_path, "a.tif")[..., 0].ravel()
    assert np.abs(grey - np.array([0 if n == place else n * 17 for n in range(16)])).max() <= 1
    Image.fromarray(np.full((4, 4), odd, np.float32)).save(tmp_path / "a.tif")
    assert not loaded(tmp_path, "a.tif").any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """All eight files show the same upright picture: red in its top left quarter."""
    upright = Image.new("RGB", (40, 24), "blue")
    upright.paste("red", (0, 0, 20, 12))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert (loaded(tmp_path, "a.png") == np.asarray(upright)).all()


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animated_gives_its_first_picture(tmp_path, kind):
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    pictures[0].save(
        tmp_path / f"a.{kind}",
        save_all=True,
        append_images=pictures[1:],
        duration=50,
        **({"lossless": True} if kind == "webp" else {}),
    )
    assert (loaded(tmp_path, f"a.{kind}") == [255, 0, 0]).all()


def test_same_bytes_same_hash(tmp_path):
    gradient().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    gradient(size=(40, 31)).save(tmp_path / "c.png")
    write_table(tmp_path, "pins", {"pin_id": list("abc"), "image": ["a.png", "b.png", "c.png"]})
    for name, columns in small_dataset().items():
        if name != "pins":
            write_table(tmp_path, name, columns)
    a, b, c = read_pictures(RawTables(tmp_path))["digest"].to_pylist()
    assert a == b != c


def test_paths_do_not_leave_the_dataset(tmp_path):
    data, outside = tmp_path / "data", tmp_path / "secret.png"
    (data / "images").mkdir(parents=True)
    gradient().save(outside)
    gradient().save(data / "images" / "a.png")
    (data / "link.png").symlink_to(outside)
    (data / "away").symlink_to(tmp_path)
    (data / "inside.png").symlink_to(data / "images" / "a.png")
    (data / "loop").symlink_to(data / "loop")
    (tmp_path / "data_of_others").mkdir()
    gradient().save(tmp_path / "data_of_others" / "a.png")
    for path in (
        str(outside),
        "../secret.png",
        "images/../../secret.png",
        "link.png",
        "away/secret.png",
        "../data_of_others/a.png",
    ):
        assert "leaves the dataset" in refused(data, path)
    refused(data, "loop")
    for path in ("images/a.png", "images/../images/a.png", "inside.png", str(data / "images" / "a.png")):
        assert loaded(data, path).shape == (30, 40, 3)


def test_report_shows_no_picture_from_outside(tmp_path):
    (tmp_path / "data").mkdir()
    gradient().save(tmp_path / "secret.png")
    gradient().save(tmp_path / "data" / "a.png")
    for path in ("../secret.png", str(tmp_path / "secret.png"), "absent.png", None, "a\x00b"):
        assert picture(tmp_path / "data", path) is None
    assert picture(tmp_path / "data", "a.png").size == (160, 160)


# ------------------------------------------------------------------------------------------------------------
# Files that say something else than they are


@pytest.mark.parametrize("kind", ["webp", "png", "jpeg", "tiff"])
@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00garbage", b"II*\x00\xff\xff\xff\xff", b"\x00" * 40, b"Exif\x00\x00MM"]
)
def test_garbage_in_exif_data_leaves_the_pixels(tmp_path, kind, exif):
    options = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpeg" else {}
    gradient().save(tmp_path / "a", kind, **({"exif": exif} if kind != "tiff" else {}), **options)
    assert np.abs(loaded(tmp_path, "a").astype(int) - np.asarray(gradient())).mean() < 3


@pytest.mark.parametrize(
    "content",
    [
        b"this is no image",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM" + bytes(60),
        b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    ],
)
def test_a_reason_is_the_same_every_time(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    reasons = {refused(tmp_path, "a.png") for _ in range(5)}
    assert len(reasons) == 1 and "0x" not in reasons.pop()


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, (0, 255)), (0, 255, (0, 255)), (0, 1000, (0, 255)), (-1, 1, (0, 255)), (0, 0.5, (0, 127))],
)
def test_real_numbers_are_scaled_by_their_range(tmp_path, low, high, expected):
    values = np.linspace(low, high, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.tif")
    grey = loaded(tmp_path, "a.tif")[..., 0].ravel()
    assert (grey[0], grey[-1]) == expected and (np.diff(grey.astype(int)) >= 0).all()


def test_only_formats_that_pillow_decodes_itself(tmp_path, monkeypatch):
    """An EPS file, whatever its name, starts no Ghostscript."""
    monkeypatch.setattr("subprocess.check_call", None)
    gradient().save(tmp_path / "a.png", "EPS")
    assert "cannot identify" in refused(tmp_path, "a.png")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000"):
        gradient().save(tmp_path / "a", kind)
        assert loaded(tmp_path, "a").shape == (30, 40, 3)


def test_only_regular_files_of_a_bounded_size(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(3 << 30)
    begin = time.time()
    assert refused(tmp_path, "pipe.png") == "no regular file"
    assert refused(tmp_path, "device.png") == "path leaves the dataset folder"
    assert refused(tmp_path, "sparse.png") == "3,221,225,472 bytes, at most 100,000,000"
    assert time.time() - begin < 1


@pytest.mark.parametrize(
    "mode, kind",
    [
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("F", "TIFF"),
        ("CMYK", "JPEG"),
        ("RGB", "JPEG"),
        ("1", "PNG"),
    ],
)
def test_a_large_picture_is_reduced(tmp_path, mode, kind):
    y, x = np.mgrid[0:1500, 0:4000]
    grey = (x * 200 // 4000 + y * 50 // 1500).astype(np.uint8)
    image = Image.fromarray(grey)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode != "L":
        image = image.convert(mode)
    image.save(tmp_path / "a", kind)
    pixels = loaded(tmp_path, "a")
    assert 512 <= pixels.shape[0] < 1024 and abs(pixels.shape[1] / pixels.shape[0] - 4000 / 1500) < 0.02
    if mode not in ("1", "CMYK"):
        assert abs(int(pixels[0, 0, 0]) - 0) < 4 and abs(int(pixels[-1, -1, 0]) - 250) < 8


def test_many_huge_pictures_take_the_memory_of_one(tmp_path):
    """Six of 36 million pixels, loaded by a pool of threads, in a process of their own."""
    Image.new("RGB", (6_000, 6_000), "red").save(tmp_path / "a.png", compress_level=1)
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from concurrent.futures import ThreadPoolExecutor
from lib.tables.images import load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = list(ThreadPoolExecutor(8).map(load_image, [{str(tmp_path)!r}] * 6, ["a.png"] * 6))
assert all(max(image.size) < 1024 for image in images), images
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300  # MB; one picture has 108 MB


def test_a_list_of_pictures_has_no_formulas(tmp_path):
    tables = small_dataset()
    tables["pins"]["image"] = ["=1+1.png", "@cmd.png", "-5"]
    tables["pins"]["pin_id"] = ["=cmd|' /C calc'!A0", "+2", "-5"]
    pictures = read_pictures(RawTables(write_dataset(tmp_path, {**tables})))
    write_skipped(tmp_path / "skipped.csv", pictures, pictures["reason"])
    with open(tmp_path / "skipped.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == ["'=cmd|' /C calc'!A0", "+2", "-5"]
    assert [row[1] for row in rows] == ["'=1+1.png", "'@cmd.png", "-5"]


@pytest.mark.parametrize(
    "stored, written",
    [
        (unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.png")),
        (unicodedata.normalize("NFC", "café.png"), unicodedata.normalize("NFD", "café.png")),
        ("a b.png", " a b.png "),
        (" a.png", " a.png"),
        ("a b.png", "file://{folder}/a%20b.png"),
    ],
)
def test_one_path_written_in_another_way(tmp_path, stored, written):
    """A table in NFC, names of files in NFD: the picture was called missing."""
    Image.new("RGB", (8, 8)).save(tmp_path / stored)
    assert load_image(tmp_path, written.format(folder=tmp_path)).size == (8, 8)


def test_a_file_url_does_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError):
        load_image(tmp_path / "data", f"file://{tmp_path}/a.png")

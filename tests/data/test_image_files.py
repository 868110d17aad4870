import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnnjax import UserError
from cnnjax.data.image_files import fit_image, fit_images, read_image


def test_a_png_of_the_right_size_is_read_exactly(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", (32, 32, 3)), image)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_kind_of_image_is_read(mode, channels, tmp_path):
    suffix = {"CMYK": "jpg"}.get(mode, "png")
    Image.new("RGB", (50, 20), (102, 102, 102)).convert(mode).save(tmp_path / f"image.{suffix}")
    image = read_image(tmp_path / f"image.{suffix}", (28, 28, channels))
    assert image.shape == (28, 28, channels)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - 102).max() <= 2  # JPEG rounds; the palette of P holds 102.


def test_black_and_white_is_read(tmp_path):
    Image.new("1", (28, 28), 1).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", (28, 28, 1)), 255)


def test_colors_become_gray_by_their_luminance(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    for color, gray in zip(colors, (76, 150, 29, 255), strict=True):  # ITU-R 601: 0.299, 0.587 and 0.114.
        Image.new("RGB", (8, 8), color).save(tmp_path / "image.png")
        np.testing.assert_array_equal(read_image(tmp_path / "image.png", (8, 8, 1)), gray)
        np.testing.assert_array_equal(read_image(tmp_path / "image.png", (8, 8, 3))[0, 0], color)


def test_the_alpha_channel_is_kept_for_networks_that_were_trained_on_it(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    image[0, :, 3] = 0
    Image.fromarray(image).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png", (8, 8, 4)), image)
    Image.fromarray(image[..., 2:]).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png", (8, 8, 2)), image[..., 2:])
    Image.fromarray(image[..., :3]).save(tmp_path / "rgb.png")
    opaque = read_image(tmp_path / "rgb.png", (8, 8, 4))
    np.testing.assert_array_equal(opaque, np.dstack([image[..., :3], np.full((8, 8), 255)]))
    gray = read_image(tmp_path / "rgb.png", (8, 8, 2))
    np.testing.assert_array_equal(gray[..., :1], read_image(tmp_path / "rgb.png", (8, 8, 1)))
    np.testing.assert_array_equal(gray[..., 1], 255)
    with pytest.raises(UserError, match="`image` must have 1 to 4 channels to be read from a file, got a network of 5"):
        read_image(tmp_path / "rgba.png", (8, 8, 5))


def test_a_palette_with_transparency_is_blended(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    for name, transparency in (("one.png", 0), ("each.png", bytes([0, 255])), ("one.gif", 0)):
        image.save(tmp_path / name, transparency=transparency)
        read = read_image(tmp_path / name, (4, 4, 3))
        assert (read[0, 0].tolist(), read[3, 3].tolist()) == ([255, 255, 255], [0, 0, 255])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_read(suffix, tmp_path):
    frames = [Image.new("L", (8, 8), gray) for gray in (64, 128, 255)]
    frames[0].save(tmp_path / f"image.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / f"image.{suffix}", (8, 8, 1)), 64)


def test_a_large_photograph_is_read_and_a_larger_one_is_refused(tmp_path, monkeypatch):
    """Pillow warns above its limit, and warnings are errors here. It raises an error above twice the limit."""
    Image.new("L", (30, 20), 50).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", (10, 10, 1)), 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with pytest.raises(UserError, match=r"got .*image\.png \(Image size \(600 pixels\) exceeds limit of 598 pixels"):
        read_image(tmp_path / "image.png", (10, 10, 1))


def test_thirty_two_bits_are_refused(tmp_path):
    Image.new("F", (28, 28), 0.5).save(tmp_path / "image.tiff")
    with pytest.raises(UserError, match=r"`image` must have 8 or 16 bits per channel, got .* \(32 bits, mode F\)"):
        read_image(tmp_path / "image.tiff", (28, 28, 1))


def test_sixteen_bit_gray_keeps_its_range(tmp_path):
    Image.fromarray(np.full((28, 28), 128 * 257, np.uint16)).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", (28, 28, 1)), np.full((28, 28, 1), 128))
    image, exif = np.repeat(np.uint16([[257 * 50], [257 * 200]]), 8, axis=1).repeat(4, axis=0), Image.Exif()
    exif[0x0112] = 3  # Orientation: upside down.
    Image.fromarray(image).save(tmp_path / "rotated.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "rotated.png", (8, 8, 1))[[0, -1], 0, 0], [200, 50])


def test_transparent_parts_become_white_and_long_sides_are_cropped(tmp_path):
    image = np.zeros((10, 30, 4), np.uint8)  # Black, and transparent except for the middle third.
    image[:, 10:20, 3] = 255
    image[:, 10:15, 0] = 200
    Image.fromarray(image).save(tmp_path / "image.png")
    read = read_image(tmp_path / "image.png", (10, 10, 3))
    np.testing.assert_array_equal(read[:, :5], np.broadcast_to([200, 0, 0], (10, 5, 3)))
    np.testing.assert_array_equal(read[:, 5:], 0)
    wide = read_image(tmp_path / "image.png", (10, 30, 3))
    np.testing.assert_array_equal(wide[:, :10], 255)


def test_a_photograph_is_rotated_upright(tmp_path):
    image = np.zeros((20, 20, 3), np.uint8)
    image[:10] = 255  # White above.
    exif = Image.Exif()
    exif[0x0112] = 3  # Orientation: upside down.
    Image.fromarray(image).save(tmp_path / "image.png", exif=exif)
    read = read_image(tmp_path / "image.png", (20, 20, 3))
    assert (read[:10].max(), read[10:].min()) == (0, 255)


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "fifo.png")
    for name, why in {
        "text.png": "of an unknown format",
        "empty.png": "of an unknown format",
        "missing.png": "No such file or directory",
        ".": "Is a directory",
        "loop.png": "Too many levels of symbolic links",
        "fifo.png": "Not a regular file",
    }.items():
        with pytest.raises(UserError) as error:
            read_image(tmp_path / name, (32, 32, 3))
        assert str(error.value) == (
            f"`image` must be an image file (PNG, JPEG, WebP, ...), got {tmp_path / name} ({why})."
        )


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
def test_a_truncated_image(suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="`image` must be an image file"):
        read_image(path, (32, 32, 3))


def test_any_error_of_a_decoder_is_a_message(tmp_path, monkeypatch):
    def fail(*args):
        raise IndexError

    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(UserError, match=r"`image` must be an image file .*image\.png \(IndexError\)"):
        read_image(tmp_path / "image.png", (8, 8, 1))


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        ("crop", [[9, 9], [9, 9], [9, 9]]),
        ("pad", [[0, 0], [9, 9], [0, 0]]),
        ("stretch", [[9, 9], [9, 9], [9, 9]]),
    ],
)
def test_a_wide_image_is_brought_to_a_tall_shape(resize, expected):
    image = Image.new("L", (4, 2), 9)
    np.testing.assert_array_equal(fit_image(image, (3, 2, 1), resize)[..., 0], expected)


def test_a_line_of_an_image_of_an_extreme_shape_is_kept():
    """At the ratio from which Pillow keeps one, both give the same pixels."""
    image = Image.fromarray(np.random.default_rng(0).integers(1, 256, (10, 2000, 3), np.uint8))
    fitted = fit_image(image, (32, 32, 3), "pad")
    np.testing.assert_array_equal(fitted[16:17], image.resize((32, 1), Image.Resampling.LANCZOS))
    assert fitted[:16].max() == fitted[17:].max() == 0
    tall = fit_image(image.transpose(Image.Transpose.TRANSPOSE), (32, 32, 3), "pad")
    np.testing.assert_array_equal(tall, fitted.transpose(1, 0, 2))
    wide = image.crop((0, 0, 639, 10))
    expected = ImageOps.pad(wide, (32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(fit_image(wide, (32, 32, 3), "pad"), expected)


def test_crop_keeps_the_center_and_stretch_all():
    image = np.repeat(np.uint8([[1, 2, 3, 4]]), 2, axis=0)  # [2 4]
    assert fit_image(Image.fromarray(image), (2, 2, 1), "crop")[0, :, 0].tolist() == [2, 3]
    stretched = fit_image(Image.fromarray(image * 50), (2, 2, 1), "stretch", "bilinear")[0, :, 0]
    # With antialiasing a triangle of width 4 at 1 and 3: weights 3, 3, 1 of 7.
    assert stretched.tolist() == [round((3 * 50 + 3 * 100 + 150) / 7), round((100 + 3 * 150 + 3 * 200) / 7)]


@pytest.mark.parametrize("interpolation", ["lanczos", "bicubic", "bilinear"])
def test_interpolation_is_that_of_pillow(interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    expected = image.resize((5, 5), Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(fit_image(image, (5, 5, 3), "stretch", interpolation), expected)
    np.testing.assert_array_equal(fit_image(image, (9, 9, 3), "crop", interpolation), image)


def test_many_images_are_fitted_in_order():
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 6, 1), np.uint8)
    got = fit_images(images, (5, 5, 3), "pad", "bicubic", "test")
    expected = [fit_image(Image.fromarray(image[..., 0]), (5, 5, 3), "pad", "bicubic") for image in images]
    np.testing.assert_array_equal(got, expected)

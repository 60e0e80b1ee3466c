"""Folders of images: which files are images, of which class, and with which pixels."""

import os
import warnings
import zlib

import numpy as np
import pytest
import torchvision
import torchvision.transforms as T
from helpers import write_image
from PIL import Image

from sogclr import InputError
from sogclr.datasets import open_data_set, open_train_and_val
from sogclr.files import ImageFiles
from sogclr.loader import center_view, random_crop


def test_files_are_those_of_torchvision(imagenet, tmp_path):
    """Files, labels and their order must be ImageFolder's, on a tree with nested folders, links and odd names."""
    for name in ("b/x.PNG", "b/a-b/1.jpg", "b/a/1.jpg", "b/a/0.JPEG", "b/note.txt", "a/é ü.jpeg", "a/x.jpg/inner.png",
                 "c/z.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c" / "link").symlink_to(imagenet / "val")
    (tmp_path / "c" / "broken.jpg").symlink_to("nowhere")
    theirs = torchvision.datasets.ImageFolder(tmp_path)
    ours = ImageFiles(tmp_path, labels=True)
    assert [(os.fsdecode(ours.path(i)), int(ours.targets[i])) for i in range(len(ours))] == theirs.samples
    assert ours.classes == theirs.classes


def test_list_of_files_is_compact(imagenet):
    """Only arrays may grow with the number of files, by one byte per character and 12 per image: no Python object per
    file, whose reference count would make every worker copy its page.
    """
    files = ImageFiles(imagenet / "train", labels=True)
    arrays = {name: value for name, value in vars(files).items() if isinstance(value, np.ndarray)}
    assert {name: value.dtype.itemsize for name, value in arrays.items()} == {"names": 1, "ends": 8, "targets": 4}
    assert [len(value) for name, value in vars(files).items() if name not in {*arrays, "root"}] == [3]     # classes


@pytest.fixture
def tree(tmp_path):
    """Three classes with 16 images each."""
    for k, name in enumerate(("ant", "bee", "cat")):
        for i in range(16):
            write_image(tmp_path / "tree" / name / f"{i}.jpg", 16 * k + i, (8, 8))
    return tmp_path / "tree"


def listed(root, labels):
    """The names of all images and of the classes, in order."""
    files = ImageFiles(root, labels)
    return [os.path.relpath(os.fsdecode(files.path(i)), root) for i in range(len(files))], files.classes


@pytest.mark.parametrize("labels", [False, True])
def test_links_to_folders_above_are_not_followed(tree, labels, capsys):
    """However many links lead back up, also through folders elsewhere: each image once, no further class, one line."""
    expected = listed(tree, labels)
    (tree / "ant" / "up").symlink_to("..")
    (tree / "bee" / "up").symlink_to("..")
    (tree / "bee" / "here").symlink_to(".")
    (tree / "cat" / "far_up").symlink_to("/")
    (tree / "again").symlink_to(tree)
    (tree.parent / "elsewhere").mkdir()
    (tree.parent / "elsewhere" / "back").symlink_to(tree)
    (tree / "cat" / "elsewhere").symlink_to(tree.parent / "elsewhere")
    capsys.readouterr()
    assert listed(tree, labels) == expected
    assert "left out links to folders above it or listed already (6, such as " in capsys.readouterr().out


def test_folder_behind_several_links_is_listed_once(tree):
    """Among links to one folder the first one counts, and none if the folder itself is there."""
    expected, _ = listed(tree, labels=False)
    (tree / "a link").symlink_to("cat")
    write_image(tree.parent / "outside" / "deeper" / "x.jpg", 1)
    for name in ("one", "two"):
        (tree / name).symlink_to(tree.parent / "outside")
    (tree / "three").symlink_to(tree.parent / "outside" / "deeper")
    assert listed(tree, labels=False)[0] == [*expected, "one/deeper/x.jpg"]


def test_links_that_lead_nowhere_are_said(tree, capsys):
    """A class on a disk that is not there must not vanish silently; a broken image is an error once it is read."""
    (tree / "dog").symlink_to(tree / "elsewhere")
    (tree / "ring").symlink_to("ring")
    (tree / "ant" / "99.jpg").symlink_to("nowhere.jpg")
    assert len(ImageFiles(tree, labels=True)) == 49
    assert "left out links that lead nowhere (2, such as 'dog')" in capsys.readouterr().out


def test_names_in_messages_are_one_line(tmp_path):
    """Also those with line breaks or other control characters, or bytes that are not UTF-8."""
    (tmp_path / os.fsdecode(b"a\nb\x1b[2J\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        ImageFiles(tmp_path, labels=False)[0]
    name = r"a\nb\x1b[2J\udce9.jpg"
    assert str(caught.value).startswith(f"{tmp_path}/{name}: not a readable image (empty, or of a format that Pil")
    for split, name in (("train", "a\nb"), ("val", "c")):
        write_image(tmp_path / split / name / "1.jpg", 0)
    with pytest.raises(InputError, match=r"different classes \(1 and 1\), 'a\\nb' is only in train"):
        open_train_and_val("folder", tmp_path)


@pytest.mark.parametrize("labels", [False, True])
def test_hidden_and_system_files_are_left_out(tree, labels, capsys):
    """They are neither classes nor images, and one line says how many there are."""
    expected = listed(tree, labels)
    for name in (".ipynb_checkpoints/1.jpg", "__MACOSX/1.jpg", "@eaDir/1.jpg", "ant/.thumbs/1.jpg", "ant/._0.jpg",
                 "bee/@eaDir/0.jpg/small.jpg", ".trash/old/1.jpg", "lost+found/1.jpg"):
        write_image(tree / name, 0)
    (tree / ".DS_Store").write_bytes(b"")
    capsys.readouterr()
    assert listed(tree, labels) == expected
    assert capsys.readouterr().out == (f"=> note: {tree}: left out hidden or system files and folders (8, such "
                                       "as '._0.jpg')\n")
    assert len(ImageFiles(tree / ".trash", labels)) == 1         # unless it is what was asked for


def test_files_of_other_kinds_are_counted(tree, capsys):
    """One line counts them by ending if they are many, and so does the error if there are no images at all."""
    (tree / "ant" / "list.txt").write_text("")
    ImageFiles(tree, labels=True)
    assert capsys.readouterr().out == ""
    for i in range(30):
        (tree / "bee" / f"{i}.HEIC").write_bytes(b"")
    ImageFiles(tree, labels=True)
    assert "31 files are not read as images (30 .heic, 1 .txt), only those named .jpg," in capsys.readouterr().out
    (tree / "dog").mkdir()
    (tree / "dog" / "0.avif").write_bytes(b"")
    with pytest.raises(InputError, match=r"no images of class 'dog' .*30 \.heic, .*1 \.avif"):
        ImageFiles(tree, labels=True)
    write_image(tree / "0.jpg", 0)
    write_image(tree / "dog" / "0.jpg", 0)
    ImageFiles(tree, labels=True)
    assert "left out images beside the class folders (1, such as '0.jpg')" in capsys.readouterr().out


def test_unreadable_folder_is_not_skipped(tree, monkeypatch):
    """A folder that cannot be listed must end the run with its name, instead of missing silently."""
    scandir = os.scandir

    def denied(path):
        if os.path.basename(path) == b"bee":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match=r"--data .*: cannot be listed: .*/bee: Permission denied"):
        open_data_set("folder", tree, "train", labels=False)


def test_16_bit_gray_keeps_its_levels(tmp_path):
    """A cone of 16 bits must come out as its values divided by 257, whatever the format."""
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    cone = (65535 * np.maximum(1 - np.hypot(x, y), 0)).astype(np.uint16)
    for name in ("cone.png", "cone.tif", "cone.pgm"):
        Image.fromarray(cone).save(tmp_path / name)
    Image.fromarray(cone.astype(">u2")).save(tmp_path / "big_endian.tiff")
    Image.fromarray(65535 - cone).save(tmp_path / "white_is_0.tif", tiffinfo={262: 0})
    files = ImageFiles(tmp_path, labels=False)
    assert len(files) == 5
    for i in range(5):
        gray = np.asarray(files[i][0])
        assert (gray == np.round(cone / 257)[..., None]).all(), files.path(i)
        assert len(np.unique(gray)) > 100
        assert len(np.unique(center_view(files[i][0], 64))) > 100


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_unknown_range_is_refused(tmp_path, dtype, mode):
    """32-bit pixels, which Pillow would clip to white or black: one line that names the file and its mode."""
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=rf"deep\.tif: not a readable image \(mode {mode}, .*convert it to 8 bits"):
        ImageFiles(tmp_path, labels=False)[0]


def put(folder, name, image, **options):
    image.save(folder / name, **options)


@pytest.fixture
def zoo(tmp_path):
    """A folder of everything that is an image, as `good`, and everything that only looks like one, as `bad`."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    put(good, "gray.jpg", rgb.convert("L"))
    put(good, "palette.png", rgb.convert("P"))
    put(good, "transparent.png", rgb.convert("P"), transparency=bytes(range(256)))
    put(good, "rgba.png", rgb.convert("RGBA"))
    put(good, "cmyk.jpg", rgb.convert("CMYK"))
    put(good, "one_bit.png", rgb.convert("1"))
    put(good, "one_wide.png", rgb.resize((1, 300)))
    put(good, "one_high.png", rgb.resize((300, 1)))
    put(good, "one_pixel.png", rgb.resize((1, 1)))
    put(good, "animated.webp", rgb, save_all=True, append_images=[rgb.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    put(good, "rotated.jpg", rgb, exif=exif)
    put(good, "png_inside.JPEG", rgb, format="PNG")
    put(good, os.fsdecode(b"latin\xe9.jpg"), rgb)
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("hello")
    (bad / "broken_link.png").symlink_to("nowhere")
    for kind in ("jpg", "png", "webp"):
        put(bad, f"whole.{kind}", rgb)
        content = (bad / f"whole.{kind}").read_bytes()
        (bad / f"whole.{kind}").unlink()
        (bad / f"truncated.{kind}").write_bytes(content[:len(content) // 2])
    header = bytearray((good / "rgba.png").read_bytes())
    header[16:24] = (60000).to_bytes(4, "big") * 2              # a decompression bomb: 3.6 gigapixels
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (bad / "bomb.png").write_bytes(header)
    (bad / "folder.jpg").mkdir()                                # not files: not listed
    os.mkfifo(bad / "pipe.jpg")
    return good, bad


def test_every_kind_of_image_is_read_as_torchvision_does(zoo):
    """Gray, palette, alpha, CMYK, 1 pixel wide, animated, EXIF-rotated, misnamed, oddly named: torchvision's
    pixels, and views of the right size.
    """
    files = ImageFiles(zoo[0], labels=False)
    assert len(files) == 13
    for i in range(len(files)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)        # Pillow's, on the palette that we read in two steps
            expected = torchvision.datasets.folder.pil_loader(os.fsdecode(files.path(i)))
        assert files[i][0].tobytes() == expected.tobytes(), files.path(i)
        crop = random_crop(T.functional.pil_to_tensor(files[i][0]), np.random.default_rng(i), 24, (0.08, 1.0))
        assert crop.shape == center_view(files[i][0], 24).shape == (3, 24, 24)


def test_every_kind_of_bad_file_is_one_line(zoo):
    """Zero bytes, text, truncated, a bomb, a broken link: an InputError of one line that names the file."""
    files = ImageFiles(zoo[1], labels=False)
    assert len(files) == 7
    for i in range(len(files)):
        with pytest.raises(InputError, match="not a readable image") as caught:
            files[i]
        assert str(caught.value).startswith(os.fsdecode(files.path(i)) + ": ")
        assert "\n" not in str(caught.value)

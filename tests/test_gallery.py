"""The picture of retrievals: which queries it shows, what it draws, what it survives."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from amp.errors import AmpError
from amp.report import drawing, gallery
from amp.report.gallery import (
    CaptionHit,
    ImageHit,
    ImageToText,
    TextToImage,
    choose_queries,
    draw_gallery,
    outcome_note,
)


def scene(size=(64, 64), mode="RGB") -> Image.Image:
    image = Image.new("RGB", size, "#a0c0ff")
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), "#603080")
    return image.convert(mode)


def image_hits(*right: bool) -> list[ImageHit]:
    return [ImageHit(scene(), 0.3 - place / 100, mark) for place, mark in enumerate(right)]


def caption_hits(*right: bool, caption: str = "A dog runs.") -> list[CaptionHit]:
    return [CaptionHit(caption, 0.3 - place / 100, mark) for place, mark in enumerate(right)]


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def pixels(path, colour: str) -> int:
    return int((read(path) == ImageColor.getrgb(colour)).all(2).sum())


# Choice


@pytest.mark.parametrize(
    ("base", "new", "count", "chosen"),
    [
        # Mended most first (from place 9, then 4), the worst broken last.
        ([0, 4, 9, 0, 2, 0], [0, 0, 0, 7, 1, 3], 3, [2, 1, 3]),
        # Room left: then the one that rose, then those that stood still, the best first.
        ([0, 4, 9, 0, 2, 5], [0, 0, 0, 7, 1, 5], 6, [2, 1, 4, 0, 5, 3]),
        # Nothing broken: one that fell from a lower place is shown instead.
        ([3, 1, 2], [0, 6, 2], 2, [0, 1]),
        # A lost first place weighs more than a deeper fall.
        ([1, 0, 5], [19, 2, 0], 2, [2, 1]),
        # Nothing fell.
        ([3, 1, 2], [0, 1, 2], 2, [0, 1]),
        # Ties go to the lower index.
        ([5, 5, 5, 0, 0], [0, 0, 0, 2, 2], 3, [0, 1, 3]),
        # All fell: the worst is last.
        ([0, 0, 0], [1, 9, 3], 3, [0, 2, 1]),
        ([5, 0], [0, 5], 1, [0]),
        ([5, 0], [0, 5], 0, []),
        ([5, 0], [0, 5], 9, [0, 1]),
        ([], [], 4, []),
    ],
)
def test_choice_by_hand(base, new, count, chosen):
    assert choose_queries(np.array(base, dtype=int), np.array(new, dtype=int), count) == chosen


def test_choice_shows_a_group_once_while_others_are_left():
    base, new, groups = [9, 8, 7, 0, 0], [0, 0, 0, 0, 4], ["a", "a", "b", "c", "b"]
    assert choose_queries(base, new, 3, groups) == [0, 3, 4]  # 1 repeats a; 2 repeats b, which is shown as broken
    assert choose_queries(base, new, 5, groups) == [0, 3, 1, 2, 4]
    with pytest.raises(ValueError, match="differ in number"):
        choose_queries(base, new, 3, groups[:-1])


@pytest.mark.parametrize("seed", range(5))
def test_choice_always_confesses(seed):
    rng = np.random.default_rng(seed)
    base, new = rng.integers(0, 20, 200), rng.integers(0, 20, 200)
    chosen = choose_queries(base, new, 6)
    assert len(set(chosen)) == 6
    assert all(new[q] == 0 < base[q] for q in chosen[:-1]) and base[chosen[-1]] == 0 < new[chosen[-1]]


def test_note_counts_all_queries():
    note = outcome_note([0, 4, 0, 3, 0] * 1000, [0, 0, 1, 2, 5] * 1000)
    assert note == "of all 5,000 queries, re-ranking mended 1,000 and broke 2,000 (first place won, lost)"


# Drawing


def test_frames_and_marks_follow_the_hits(tmp_path):
    def draw(base, new):
        path = draw_gallery(tmp_path / "gallery.png", [TextToImage("A dog.", ["dog, runs, "], base, new)])
        return pixels(path, drawing.RIGHT), pixels(path, drawing.WRONG)

    none_right, all_wrong = draw(image_hits(False, False, False), image_hits(False, False, False))
    all_right, none_wrong = draw(image_hits(True, True, True), image_hits(True, True, True))
    assert none_right == 0 and none_wrong == 0
    assert all_right > 6 * 4 * gallery.THUMB and all_wrong > 6 * 4 * gallery.THUMB  # 6 frames of several pixels
    right, wrong = draw(image_hits(False, True, False), image_hits(True, False, False))
    assert 0.2 < right / all_right < 0.45 and 0.5 < wrong / all_wrong < 0.8  # 2 and 4 of 6


def test_right_frame_is_around_the_right_image(tmp_path):
    example = TextToImage("A dog.", [], image_hits(False, True, False), image_hits(True, False, False))
    page = read(draw_gallery(tmp_path / "gallery.png", [example]))
    green = (page == ImageColor.getrgb(drawing.RIGHT)).all(2)
    for group, place in ((0, 1), (1, 0)):
        left = gallery.MARGIN + gallery.GROUP_X[group] + place * (gallery.THUMB + gallery.GAP)
        frame = green[:, left + 1 : left + gallery.FRAME - 1]
        assert frame.any(0).all() and frame.sum(0).min() > gallery.THUMB / 2
        green[:, left : left + gallery.THUMB + gallery.GAP] = False
    heading = gallery.MARGIN + gallery.GROUP_X[0]
    assert not green[:, heading:].any()  # nothing else is green right of the text


def test_captions_are_tinted_by_their_marks(tmp_path):
    def draw(base, new):
        path = draw_gallery(tmp_path / "gallery.png", (), [ImageToText(scene((500, 333)), base, new)])
        return pixels(path, drawing.RIGHT_TINT), pixels(path, drawing.WRONG_TINT)

    assert draw(caption_hits(True, True, True), caption_hits(True, True, True))[1] == 0
    assert draw(caption_hits(False, False, False), caption_hits(False, False, False))[0] == 0
    right, wrong = draw(caption_hits(False, True, True), caption_hits(True, True, False))
    assert right > 1.5 * wrong > 0


def test_picture_is_deterministic(tmp_path):
    example = TextToImage("A dog.", ["dog, runs, "], image_hits(False, True, False), image_hits(True, False, False))
    first, second = (draw_gallery(tmp_path / name, [example]).read_bytes() for name in ("a.png", "b.png"))
    assert first == second and sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (1, 3000), (3000, 2), (500, 333)])
def test_any_image_fits(size):
    fit = drawing.fit_image(scene(size, "RGB"), (156, 156))
    assert fit.size == (156, 156) and fit.mode == "RGB"


def test_image_is_whole_and_undistorted():
    wide = Image.new("RGB", (400, 200), "#ff0000")
    fit = np.asarray(drawing.fit_image(wide, (100, 100)))
    red = (fit == (255, 0, 0)).all(2)
    assert red[25:75].all() and not red[:25].any() and not red[75:].any()


def test_small_drawings_stay_sharp():
    """Random black and white pixels, enlarged by no whole number: each new pixel is the mean of what it covers."""
    pixels_drawn = np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8) * 255
    old, new = np.arange(65), np.arange(157) * 64 / 156
    overlap = np.minimum(new[1:, None], old[None, 1:]) - np.maximum(new[:-1, None], old[None, :-1])
    weights = overlap.clip(0) * 156 / 64
    fit = np.asarray(drawing.fit_image(Image.fromarray(pixels_drawn).convert("RGB"), (156, 156)))[..., 0]
    assert np.abs(fit - weights @ pixels_drawn @ weights.T).mean() < 5  # smooth enlargement alone: above 20


@pytest.mark.parametrize(
    "text", ["a " * 500, "word " * 500, "x" * 5000, "", "One. Two three four five six seven.", "犬が走る" * 40]
)
def test_wrapped_lines_fit(text):
    font = drawing.Font(22)
    lines = drawing.wrap(text, font, 300, 5)
    assert 1 <= len(lines) <= 5 and all(font.getlength(line) <= 300 for line in lines)
    whole = drawing.wrap(text, font, 300, 1000)
    assert "".join(whole).replace(" ", "") == drawing.clean(text).replace(" ", "")
    assert (lines == whole) if len(whole) <= 5 else lines[-1].endswith("…")


def test_text_is_one_printable_line():
    assert drawing.clean(" a\t b\n\u00a0c\x00\ud800\u202e ") == "a b c\ufffd\ufffd\ufffd"
    assert drawing.wrap("WW W", drawing.Font(22), 1, 10) == ["W", "W", "W"]  # never less than a character a line


def test_hostile_text_and_short_lists_are_drawn(tmp_path):
    text = "Mädchen läuft\n\tüber \ud800 die \x00 Straße 犬が走る 🐕 \u202e" + "word" * 400
    draw_gallery(
        tmp_path / "gallery.png",
        [TextToImage(text, [text] * 12, image_hits(True), []), TextToImage("", [], [], [])],
        [
            ImageToText(scene((1, 900)), caption_hits(True, False, True, True, caption=text), []),
            ImageToText(scene(), [], []),
        ],
        text,
        text,
        text,
        text,
    )
    assert read(tmp_path / "gallery.png").shape[1] == gallery.CARD_WIDTH + 2 * gallery.MARGIN


@pytest.fixture
def font_file(tmp_path):
    """A font of the machine that draws one Chinese character, as a full square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    square, empty = TTGlyphPen(None), TTGlyphPen(None)
    square.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        square.lineTo(corner)
    square.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "dog"])
    font.setupCharacterMap({ord("犬"): "dog"})
    font.setupGlyf({".notdef": empty.glyph(), "dog": square.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "dog": (1000, 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "Square.ttf")
    return str(tmp_path / "Square.ttf")


@pytest.fixture
def fonts(monkeypatch):
    """Replaces the fonts of the machine by those of a list."""
    files: list[str] = []
    drawing._file_with.cache_clear()
    monkeypatch.setattr(drawing, "_other_fonts", lambda: files)
    monkeypatch.setattr(drawing, "_missing", set())
    yield files
    drawing._file_with.cache_clear()


def test_letters_that_dejavu_lacks_come_from_a_font_of_the_machine(fonts, font_file, capsys):
    fonts.append(font_file)
    assert drawing.clean("a 犬 b") == "a 犬 b" and capsys.readouterr().err == ""
    font = drawing.Font(20)
    alone = [drawing.Font(20).getlength(part) for part in ("a ", " b")]
    assert font.getlength("a 犬 b") == pytest.approx(sum(alone) + 20)  # as wide as the font is high
    for anchor, left in (("lm", 10), ("rm", 190 - font.getlength("犬犬"))):
        page = Image.new("L", (200, 40))
        drawing.draw_text(ImageDraw.Draw(page), (10 if anchor == "lm" else 190, 20), "犬犬", "white", font, anchor)
        assert (
            page.getbbox()[0] == left and page.getbbox()[2] == left + 38 and page.getbbox()[3] - page.getbbox()[1] == 18
        )
    assert drawing.plot_fonts("a犬") == ["DejaVu Sans", "Square"]


def test_letters_that_no_font_has_are_written_as_codes_and_names(fonts, capsys):
    assert drawing.clean("犬 runs 🐕‍🦺") == r"\u72ac runs [dog][safety vest]"
    told = capsys.readouterr().err
    assert told.count("no font of this machine has \\u72ac (CJK UNIFIED IDEOGRAPH-72AC)") == 1
    drawing.clean("走")
    assert capsys.readouterr().err == ""  # said once
    assert drawing.clean("Mu\u0308nchen") == "M\u00fcnchen"


def test_plots_show_names_in_any_script(fonts):
    """Matplotlib warns of every character that it draws as a box."""
    from types import SimpleNamespace

    from amp.report.plots import dot_plot
    from amp.sweep.plot import draw

    line = SimpleNamespace(values=[1], mean=lambda i: float(i), error=lambda i: 1.0)
    rows = [SimpleNamespace(name=name, train=True) for name in ("control $x", "犬 🐕")]
    config = SimpleNamespace(tables=[SimpleNamespace(rows=rows)], split="test", seeds=[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(config, {row.name: line for row in rows}, line).startswith(b"\x89PNG")
        assert "犬 🐕" in dot_plot([("犬 🐕", [(1.0, 0.0, 2.0)] * 3)])


def test_a_picture_of_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(AmpError, match=r"a\.bmp: the suffix is '\.bmp', expected one of \.png, \.jpg"):
        draw_gallery(tmp_path / "a.bmp", [TextToImage("", [], [], [])])
    assert Image.open(draw_gallery(tmp_path / "a.jpg", [TextToImage("", [], [], [])])).format == "JPEG"


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(AmpError, match=r"gallery\.png: no query to draw"):
        draw_gallery(tmp_path / "gallery.png")

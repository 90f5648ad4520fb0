"""The figure of retrievals: choice of queries, drawing, and handling of unusual input."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

import amp
from amp.errors import AmpError
from amp.report import drawing, fonts, gallery
from amp.report.choice import choose_queries, outcome_note
from amp.report.contact_sheet import draw_contact_sheet
from amp.report.gallery import Result, Retrieval, draw_gallery
from amp.retrieval.figures import RowKey
from amp.search.retriever import Found, Hit


def scene(size=(64, 64), mode="RGB") -> Image.Image:
    image = Image.new("RGB", size, "#a0c0ff")
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), "#603080")
    return image.convert(mode)


def results(*right: bool, shown: Image.Image | str | None = None) -> list[Result]:
    return [Result(shown or scene(), 0.3 - place / 100, mark) for place, mark in enumerate(right)]


def dog(base: list[Result], reranked: list[Result], triplets=("dog, runs, ",)) -> Retrieval:
    return Retrieval("A dog.", base, reranked, triplets)


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def pixels(path, colour: str) -> int:
    return int((read(path) == ImageColor.getrgb(colour)).all(2).sum())


# Choice of queries


@pytest.mark.parametrize(
    ("base", "new", "count", "chosen"),
    [
        # The most improved first (from rank 9, then 4), the most degraded last.
        ([0, 4, 9, 0, 2, 0], [0, 0, 0, 7, 1, 3], 3, [2, 1, 3]),
        # If there is room: then the other improved one, then unchanged ones, the best first.
        ([0, 4, 9, 0, 2, 5], [0, 0, 0, 7, 1, 5], 6, [2, 1, 4, 0, 5, 3]),
        # No first rank is lost: one that fell from a lower rank is shown instead.
        ([3, 1, 2], [0, 6, 2], 2, [0, 1]),
        # A lost first rank counts more than a larger fall.
        ([1, 0, 5], [19, 2, 0], 2, [2, 1]),
        # Nothing fell.
        ([3, 1, 2], [0, 1, 2], 2, [0, 1]),
        # Ties go to the lower index.
        ([5, 5, 5, 0, 0], [0, 0, 0, 2, 2], 3, [0, 1, 3]),
        # All fell: the most degraded is last.
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
    assert choose_queries(base, new, 3, groups) == [0, 3, 4]  # 1 repeats a; 2 repeats b, which is shown as degraded
    assert choose_queries(base, new, 5, groups) == [0, 3, 1, 2, 4]
    with pytest.raises(ValueError, match="differ in number"):
        choose_queries(base, new, 3, groups[:-1])


@pytest.mark.parametrize("seed", range(2))
def test_choice_always_confesses(seed):
    rng = np.random.default_rng(seed)
    base, new = rng.integers(0, 20, 200), rng.integers(0, 20, 200)
    chosen = choose_queries(base, new, 6)
    assert len(set(chosen)) == 6
    assert all(new[q] == 0 < base[q] for q in chosen[:-1]) and base[chosen[-1]] == 0 < new[chosen[-1]]


def test_note_counts_all_queries():
    note = outcome_note([0, 4, 0, 3, 0] * 1000, [0, 0, 1, 2, 5] * 1000)
    assert note == "re-ranking fixed 1,000 and broke 2,000 of 5,000 queries (first result)"


# Drawing


def test_frames_and_marks_follow_the_results(tmp_path):
    def draw(base, new):
        path = draw_gallery(tmp_path / "gallery.png", [dog(base, new)])
        return pixels(path, drawing.RIGHT), pixels(path, drawing.WRONG)

    none_right, all_wrong = draw(results(False, False, False), results(False, False, False))
    all_right, none_wrong = draw(results(True, True, True), results(True, True, True))
    assert none_right == 0 and none_wrong == 0
    assert min(all_right, all_wrong) > 6 * 4 * gallery.THUMB * drawing.DPI  # 6 frames of several pixels
    right, wrong = draw(results(False, True, False), results(True, False, False))
    assert 0.2 < right / all_right < 0.45 and 0.5 < wrong / all_wrong < 0.8  # 2 and 4 of 6


def test_the_right_frame_is_around_the_right_image(tmp_path):
    retrieval = dog(results(False, True, False), results(True, False, False))
    page = read(draw_gallery(tmp_path / "gallery.png", [retrieval]))
    green = (page == ImageColor.getrgb(drawing.RIGHT)).all(2)
    for group, place in ((0, 1), (1, 0)):
        left = gallery.MARGIN + gallery.GROUP_X[group] + place * (gallery.THUMB + gallery.GAP)
        inside = slice(round(left * drawing.DPI), round((left + gallery.THUMB) * drawing.DPI))
        frame = green[:, inside]
        assert frame[:, 1:4].any(0).all() and frame[:, 1:4].sum(0).min() > gallery.THUMB * drawing.DPI / 2
        green[:, inside] = False
    results_begin = round((gallery.MARGIN + gallery.GROUP_X[0]) * drawing.DPI)
    assert not green[:, results_begin:].any()


def test_captions_are_tinted_by_their_marks(tmp_path):
    def draw(base, new):
        base, new = results(*base, shown="A dog runs."), results(*new, shown="A dog runs.")
        path = draw_gallery(tmp_path / "gallery.png", (), [Retrieval(scene((500, 333)), base, new)])
        return pixels(path, drawing.RIGHT_TINT), pixels(path, drawing.WRONG_TINT)

    assert draw((True, True, True), (True, True, True))[1] == 0
    assert draw((False, False, False), (False, False, False))[0] == 0
    right, wrong = draw((False, True, True), (True, True, False))
    assert right > 1.5 * wrong > 0


def test_the_picture_is_deterministic(tmp_path):
    retrieval = dog(results(False, True, False), results(True, False, False))
    first, second = (draw_gallery(tmp_path / name, [retrieval]).read_bytes() for name in ("a.png", "b.png"))
    assert first == second and sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(("size", "drawn"), [((400, 200), (100, 50)), ((20, 40), (50, 100)), ((1, 3000), (1, 100))])
def test_a_photo_is_whole_and_undistorted(tmp_path, size, drawn):
    page = drawing.Page(2, 2)
    side = 100 / drawing.DPI
    page.photo(0.5, 0.5, side, side, Image.new("RGB", size, "#ff0000"))
    red = (read(page.save(tmp_path / "page.png")) == (255, 0, 0)).all(2)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    if min(drawn) > 1:
        assert np.ptp(columns) + 1 == pytest.approx(drawn[0], abs=2)
        assert columns.mean() == rows.mean() == pytest.approx(60 + 50, abs=1)
        assert np.ptp(rows) + 1 == pytest.approx(drawn[1], abs=2)


@pytest.mark.parametrize(
    "text",
    ["a " * 500, "word " * 500, "x" * 5000, "", "One. Two three four five six seven.", "W" * 300, "犬が走る" * 40],
)
def test_wrapped_lines_fit(text, tmp_path):
    lines = fonts.wrap(text, 2.5, 13, 5)
    assert 1 <= len(lines) <= 5
    whole = fonts.wrap(text, 2.5, 13, 1000)
    assert "".join(whole).replace(" ", "") == fonts.clean(text).replace(" ", "")
    assert (lines == whole) if len(whole) <= 5 else lines[-1].endswith("…")
    page = drawing.Page(4, 2)
    page.text(0.5, 0.1, lines, 13)
    assert not (read(page.save(tmp_path / "page.png"))[:, 363:] != ImageColor.getrgb(drawing.GROUND)).any()


def test_text_is_one_printable_line():
    assert fonts.clean(" a\t b\n\u00a0c\x00\ud800\u202e ") == "a b c\ufffd\ufffd\ufffd"
    assert fonts.wrap("WW W", 0.01, 12, 10) == ["W", "W", "W"]  # never less than one character per line


def test_text_is_drawn_as_it_is(tmp_path):
    """Matplotlib would parse "$...$" as a formula, and fail on this one."""

    def draw(text):
        page = drawing.Page(2, 0.5)
        page.text(0.1, 0.1, [text], 12)
        return read(page.save(tmp_path / "page.png"))

    assert (draw("$\\frac{$") != draw("$frac{$")).any() and (draw("$x$") != draw("x")).any()


def test_hostile_text_and_short_lists_are_drawn(tmp_path):
    text = "Mädchen läuft\n\tüber \ud800 die \x00 $\\frac{$ 犬が走る 🐕 كلب \u202e" + "word" * 400
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_gallery(
            tmp_path / "gallery.png",
            [Retrieval(text, results(True), [], [text] * 12), Retrieval("", [], [])],
            [
                Retrieval(scene((1, 900)), results(True, False, True, True, shown=text), []),
                Retrieval(scene(mode="LA"), [], []),
            ],
            text,
            text,
            text,
            text,
        )
    assert read(tmp_path / "gallery.png").shape[1] == int((gallery.CARD_WIDTH + 2 * gallery.MARGIN) * drawing.DPI)


def test_a_contact_sheet_of_any_size(tmp_path, capfd):
    sizes = [(64, 64), (30, 900), (900, 30)]
    for number in range(9):
        scene(sizes[number % 3]).save(tmp_path / f"{number} $x$.png")
    hits = [Hit(tmp_path / f"{number} $x$.png", 0.5, 0.4, 8 - number) for number in range(9)]
    knowledge = amp.Knowledge((amp.Triplet("dog", "runs", ""),), ("It runs $\\frac{$",))
    heights = []
    for count in (1, 4, 5, 9):
        path = draw_contact_sheet(tmp_path / "sheet.png", Found("$\\frac{$ 犬", knowledge, hits[:count], {}))
        heights.append(read(path).shape[0])
    assert heights[0] == heights[1] < heights[2] < heights[3]
    assert "findfont" not in capfd.readouterr().err
    with pytest.raises(AmpError, match="no photo was found"):
        draw_contact_sheet(tmp_path / "none.png", Found("dog", knowledge, [], {}))


@pytest.fixture
def font_file(tmp_path):
    """A system font with one Chinese character, drawn as a full square."""
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
def machine_fonts(monkeypatch):
    """Replaces the system fonts by a list of fonts."""
    files: list[str] = []
    fonts._glyph.cache_clear()
    monkeypatch.setattr(fonts, "_other_fonts", lambda: files)
    monkeypatch.setattr(fonts, "_missing", set())
    yield files
    fonts._glyph.cache_clear()


def test_letters_that_dejavu_lacks_come_from_a_font_of_the_machine(machine_fonts, font_file, tmp_path, capsys):
    machine_fonts.append(font_file)
    assert fonts.clean("a 犬 b") == "a 犬 b" and capsys.readouterr().err == ""
    assert fonts.plot_fonts("a犬") == ["DejaVu Sans", "Square"]
    assert fonts.wrap("犬" * 5, 2.5 * 12 / 72, 12, 9) == ["犬犬", "犬犬", "犬"]  # each is as wide as the font is high
    page = drawing.Page(2, 0.5)
    page.text(0.5, 0.1, ["犬犬"], 36)
    dark = (read(page.save(tmp_path / "page.png")) == ImageColor.getrgb(drawing.INK)).all(2)
    assert np.ptp(np.flatnonzero(dark.any(0))) == pytest.approx(1.9 * 36 / 72 * drawing.DPI, abs=3)


def test_letters_that_no_font_has_are_written_as_codes_and_names(machine_fonts, capsys):
    assert fonts.clean("犬 runs 🐕‍🦺") == r"\u72ac runs [dog][safety vest]"
    told = capsys.readouterr().err
    assert told.count("no font of this machine has \\u72ac (CJK UNIFIED IDEOGRAPH-72AC)") == 1
    fonts.clean("走")
    assert capsys.readouterr().err == ""  # the warning is printed only once
    assert fonts.clean("Mu\u0308nchen") == "M\u00fcnchen"


def test_plots_show_names_in_any_script(machine_fonts):
    """Matplotlib warns about every character that it draws as a box."""
    from types import SimpleNamespace

    from amp.report.plots import dot_plot
    from amp.sweep.plot import draw

    line = SimpleNamespace(values=[1], mean=lambda i: float(i), error=lambda i: 1.0)
    rows = [SimpleNamespace(name=name, train=True) for name in ("control $x", "犬 🐕")]
    config = SimpleNamespace(tables=[SimpleNamespace(rows=rows)], split="test", seeds=[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(config, {RowKey(row.name): line for row in rows}, line).startswith(b"\x89PNG")
        assert "犬 🐕" in dot_plot([("犬 🐕", [(1.0, 0.0, 2.0)] * 3)])


def test_a_picture_of_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(AmpError, match=r"a\.bmp: the suffix is '\.bmp', expected one of \.png, \.jpg"):
        draw_gallery(tmp_path / "a.bmp", [Retrieval("", [], [])])
    assert Image.open(draw_gallery(tmp_path / "a.jpg", [Retrieval("", [], [])])).format == "JPEG"


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(AmpError, match=r"gallery\.png: no query to draw"):
        draw_gallery(tmp_path / "gallery.png")

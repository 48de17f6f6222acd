"""Pages load nothing and escape what they are given."""

from pathlib import Path

from trainer.analysis.pages import Fold, Part, Picture, Section, Table, Text, page, write_page


def test_text_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    evil = "<script>alert(1)</script>"
    parts: list[Part] = [
        Text(evil),
        Table([evil], [[evil, f"!{evil}"]], evil),
        Picture(tmp_path / "a.svg", f'"{evil}', evil),
        Fold(evil, evil),
    ]
    text = page(evil, evil, [Section(evil, parts)])
    assert "<script" not in text and "&lt;script&gt;" in text
    assert 'src="data:image/svg+xml;base64,' in text
    assert "default-src 'none'" in text
    assert not any(word in text.replace("http://www.w3.org", "") for word in ("http://", "https://"))


def test_columns_of_words_stand_left_and_numbers_right(tmp_path: Path) -> None:
    table = Table(
        ["model", "task", "value", ""], [["GenSR", "Search", "+.029", ""], ["UniSAR", "!Both", "!5", ""]]
    )
    text = write_page(tmp_path / "p.html", "t", "l", [Section("s", [table])]).read_text()
    assert '<th scope="col" class=left>task</th><th scope="col">value</th>' in text
    assert '<td class="left">GenSR</td><td class="left">Search</td><td>+.029</td><td></td>' in text
    assert '<td class="marked left">Both</td><td class="marked">5</td>' in text


def test_a_marked_cell_loses_its_sign(tmp_path: Path) -> None:
    text = write_page(tmp_path / "p.html", "t", "l", [Section("s", [Table(["a"], [["!5"]])])]).read_text()
    assert '<td class="marked">5</td>' in text
    assert "<nav" not in text  # of one section


def test_a_hyphen_before_a_number_is_a_minus_and_a_table_may_have_no_head() -> None:
    text = page("t", "", [Section("s", [Table((), [["flan-t5", "-.021 [-0.0010, +0.0007]"]])])])
    assert "−.021 [−0.0010, +0.0007]" in text and "flan-t5" in text and "<thead>" not in text


def test_a_page_of_one_section_says_its_title_once() -> None:
    text = page("Gradient conflict", "lead", [Section("Gradient conflict", [Table(["a"], [["5"]])])])
    assert "<h1>Gradient conflict</h1>" in text and "<h2>" not in text
    assert "<h2>Training</h2>" in page("a run", "lead", [Section("Training", [])])

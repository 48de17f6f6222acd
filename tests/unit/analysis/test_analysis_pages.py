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


def test_a_marked_cell_loses_its_sign(tmp_path: Path) -> None:
    text = write_page(tmp_path / "p.html", "t", "l", [Section("s", [Table(["a"], [["!5"]])])]).read_text()
    assert "<td class=marked>5</td>" in text
    assert "<nav" not in text  # of one section

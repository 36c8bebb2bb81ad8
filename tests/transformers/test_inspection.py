"""Where attention went: against the sums of the operator, as a picture, and as a page in a real browser."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_projected import random_projector
from tiny_models import build
from tiny_tokenizers import build_tokenizer

from c2c_kernels import inspection
from c2c_kernels.alignment import token_spans
from c2c_kernels.integrations.transformers import enable, read_tokens, record_mass, session

TEXT = "afbg a cedi\nhgfe aff djp."
PROMPT, ANSWER = [5, 9, 3], [7, 4, 8, 6]
# Texts that would break out of a page, a formula or a font.
WORDS = ["</script><script>document.title='broken'</script>", "$x_1$", "<b>", "&amp;", "\n", "\u2028", "é🙂", "\x01"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def model():
    return enable(build("llama"))


@pytest.fixture(scope="module")
def context(model):
    sharer, tokenizers = build("gemma3", seed=1), (build_tokenizer(8), build_tokenizer(3))
    projector = random_projector(sharer, model, prefix=(1,))
    projector.add_gates(model.config.num_attention_heads, 0.5)
    spans = [token_spans(tokenizer, TEXT) for tokenizer in tokenizers]
    with torch.no_grad():
        return projector.context(read_tokens(sharer, spans[0].ids), *spans, prefix=read_tokens(model, (1,)))


def _words(context) -> list[str]:
    length = context.layers[0][-1].key.shape[2]
    return [*WORDS, *(f"word{number}" for number in range(length))][:length]


@pytest.fixture(scope="module")
def look(model, context) -> inspection.Look:
    about = {"receiver": "R & <i>", "sharer": "S", "question": "Who $is$ </script>?"}
    gates = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    pieces = ["</", "script>", " $a$", "\n"]
    return inspection.look(
        model, context, PROMPT, ANSWER, words=_words(context), pieces=pieces, gates=gates, about=about
    )


@torch.no_grad()
def test_shares_are_those_of_the_operator(model, context, look: inspection.Look):
    with session(model, context), record_mass(model) as record:
        model(torch.tensor([[*PROMPT, *ANSWER[:-1]]]), use_cache=False)
    wanted = torch.stack([calls[0][0, :, -len(ANSWER) :, -1] for calls in record.mass])
    torch.testing.assert_close(look.weights.sum(dim=3), wanted, rtol=1e-4, atol=1e-5)
    assert look.weights.shape == (4, 6, len(ANSWER), len(_words(context)))
    torch.testing.assert_close(look.by_head, wanted.mean(dim=2), rtol=1e-4, atol=1e-5)
    for part in (look.by_word.sum(dim=1).mean(), look.drawn_on.sum(dim=1).mean()):
        torch.testing.assert_close(part, wanted.mean(), rtol=1e-4, atol=1e-5)


def test_the_strongest_are_in_order_and_leave_out_the_first(look: inspection.Look):
    for row, strongest in zip(look.drawn_on, look.strongest(5), strict=True):
        assert len(set(strongest)) == 5 and 0 not in strongest
        found = row[strongest].tolist()
        assert found == sorted(found, reverse=True)
        assert found[-1] >= max(value for at, value in enumerate(row.tolist()) if at and at not in strongest)


def test_what_does_not_fit_is_refused(model, context):
    words = _words(context)
    with pytest.raises(ValueError, match="answer is empty"):
        inspection.look(model, context, PROMPT, [], words=words, pieces=[])
    with pytest.raises(ValueError, match="pieces has 1 entries, answer 4 tokens"):
        inspection.look(model, context, PROMPT, ANSWER, words=words, pieces=["a"])
    with pytest.raises(
        ValueError, match=rf"words has {len(words) - 1} entries, the context's last segment \[{len(words)}\]"
    ):
        inspection.look(model, context, PROMPT, ANSWER, words=words[1:], pieces=["a"] * 4)


@pytest.mark.parametrize("gates", [True, False])
def test_the_picture_is_drawn(look: inspection.Look, tmp_path: Path, gates: bool):
    from matplotlib.image import imread

    bare = inspection.Look(look.words, look.answer, look.weights, look.gates if gates else None, look.about)
    inspection.draw(bare, tmp_path / "look.png")
    image = imread(tmp_path / "look.png")
    assert image.shape[0] > 800 and image.shape[1] > 1200 and len(set(image[..., 0].flatten().tolist())) > 50


def test_the_page_asks_for_nothing_from_elsewhere(look: inspection.Look, tmp_path: Path):
    inspection.write_page(look, tmp_path / "look.html")
    page = (tmp_path / "look.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(|https?://|fetch\(|XMLHttpRequest""", page)
    # the texts end no script: those of the page are its data and its code
    assert page.count("</script>") == page.count("<script") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["look.html"]


def _browser(page: Path, *options: str, fragment: str = "") -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--no-first-run", f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri() + fragment]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
def test_the_page_works_in_a_browser(look: inspection.Look, tmp_path: Path):
    page = tmp_path / "look.html"
    inspection.write_page(look, page)
    found = _browser(page, "--dump-dom", fragment="#token=2")
    assert f'data-ready="{len(look.words)}"' in found and "data-error" not in found
    assert "<title>Attention on what another model has read</title>" in found
    spans = re.findall(r"<span ([^>]*)>(.*?)</span>", found.partition('id="document"')[2], re.DOTALL)
    assert [html.unescape(text) for _, text in spans] == list(look.words)
    # the chosen answer token colours its strongest word darkest: the one with white text and its share as title
    strongest = look.strongest(1)[2][0]
    share = 100 * look.drawn_on[2, strongest].item()
    assert " color: rgb(255, 255, 255)" in spans[strongest][0]
    title = re.search(r'title="([0-9.]+)%"', spans[strongest][0])
    assert title is not None and float(title[1]) == pytest.approx(share, abs=0.06)
    assert re.findall(r'aria-pressed="(\w+)"', found) == ["false", "false", "false", "true", "false"]
    assert '<div id="gatesBox">' in found
    _browser(page, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1200,1400")
    from matplotlib.image import imread

    image = imread(tmp_path / "shot.png")
    assert image.shape[:2] == (1400, 1200) and len(set(image[..., 0].flatten().tolist())) > 20

"""The page of `autoseq inspect --html`: what it says, that nothing of the model becomes markup, and how it behaves in a browser."""

import re
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoseq.html_report
import chromium
import zoo
from autoseq.dry_run import add_counts
from autoseq.html_costs import predicted_times, totals
from autoseq.html_report import html_page, inspect_pictures
from autoseq.inspection import Made
from autoseq.options import Options
from autoseq.planner import make_plan
from inspected_models import OneAttention, break_graph, make_model
from trainings import H100, training

EVIL = "<script>document['title']='owned'</script><img src=x onerror=\"document['title']='owned'\">"
TARGET = "</title><script>document.title='owned'</script>"


class Attention(nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.qkv, self.window = nn.Linear(16, 48), window

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        places = torch.arange(x.shape[1], device=x.device)
        mask = places[:, None] >= places[None, :]
        if self.window:
            mask = mask & (places[:, None] - places[None, :] < self.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # </code><script>document.title='owned'</script>
        return out.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.add_module(EVIL, Attention(window))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get_submodule(EVIL)(self.norm(x))


class Nasty(nn.Module):
    """Two window layers and a full one, twice; then a step that must have all rows. Names and source lines try to be markup."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(0 if number % 3 == 2 else 8) for number in range(6))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        x = torch.sort(x, dim=1).values  # '"><script>document.title='owned'</script>
        return self.head(x).mean()


def make_nasty() -> tuple[nn.Module, dict[str, Any]]:
    return Nasty(), {"x": torch.randn(1, 64, 16)}


def make_zoo(name: str) -> tuple[nn.Module, dict[str, Any]]:
    entry = zoo.ZOO[name]
    return entry.make(entry.attention[0]), entry.batch()


@pytest.fixture(scope="module")
def nasty() -> str:
    found = inspect_pictures(make_nasty, seq_len=64, world_size=4, options=Options(strategy="gather_kv", layout="contiguous"))
    return html_page(found, TARGET)


@pytest.fixture(scope="module")
def llama() -> str:
    found = inspect_pictures(partial(make_model, "llama", 1, 32), seq_len=32, world_size=2, options=Options(strategy="ring"))
    return html_page(found, "hf:llama.json")


class Elements(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


# What it says ---------------------------------------------------------------------------------------------------------


def words(page: str) -> str:
    return " ".join(Elements(page).text.split())


def test_the_page_shows_the_model_its_costs_and_how_it_is_split(llama: str) -> None:
    shown = words(llama)
    for expected in (
        "The same program twice: as it is written, for one device, and as each of 2 ranks runs it",
        "2 × model.layers.0 … model.layers.1 LlamaDecoderLayer",  # folded
        "q_proj Linear f32[1, 32, 32] f32[1, 16, 32] Shard(1)",  # before and after
        "attention 4 heads, 2 of keys and values k <= q ring",
        "B*K*e*t*(D + V)*(P - 1)",  # the ring's formula
        "gradients of 21 parameters",
        "None: no step runs on gathered values.",
    ):
        assert expected in shown
    assert "model.layers.1.self_attn" not in re.sub(r"<[^>]*>", " ", llama).split("Attention")[0]


def test_a_fallback_shows_where_values_are_gathered_and_what_that_costs(nasty: str) -> None:
    shown = words(nasty)
    assert "all-gather ↓ forward 3.07 kB" in shown  # 48 rows of 16 float32
    assert "on gathered values, 3.07 kB" in shown
    assert "aten.sort.default" in shown


def test_alternating_layers_fold_by_their_period(nasty: str) -> None:
    assert "2 × 3 blocks, layers.0 … layers.5 Layer" in words(nasty)
    assert nasty.count('class="row attention') == 2  # a window layer for two, and a full one


def test_every_drawing_that_is_used_is_defined(nasty: str, llama: str) -> None:
    for page in (nasty, llama):
        elements = Elements(page).found
        defined = {attributes["id"] for tag, attributes in elements if tag == "symbol"}
        used = {str(attributes["href"]).removeprefix("#") for tag, attributes in elements if tag == "use"}
        assert used
        assert used <= defined


def test_one_rank_has_a_page_too() -> None:
    found = inspect_pictures(partial(make_model, "plain", 1, 16), seq_len=16, world_size=1, options=Options())
    shown = words(html_page(found, "plain"))
    assert "The one rank" in shown
    assert "Nothing is sent." in shown


@pytest.mark.parametrize(
    ("make", "strategy", "world_size"),
    [
        pytest.param(make_nasty, "auto", 4, id="several strategies and a fallback"),
        pytest.param(partial(make_model, "llama", 1, 32), "ulysses", 3, id="heads that do not divide"),
        pytest.param(partial(make_model, "plain", 1, 37), "hybrid", 4, id="two levels, tied embeddings"),
        pytest.param(partial(make_zoo, "t5"), "auto", 2, id="an encoder and a decoder"),
        pytest.param(partial(make_zoo, "mixtral"), "auto", 2, id="experts"),
    ],
)
def test_what_rows_send_adds_up_to_what_a_step_sends(make: Callable[[], Made], strategy: str, world_size: int) -> None:
    options = Options(strategy=strategy, ranks_per_node=2 if strategy == "hybrid" else None)
    found = inspect_pictures(make, seq_len=64, world_size=world_size, options=options)
    (picture,) = found.pictures
    total = totals(picture.items).sent.step
    for summed in picture.gradients:
        total = add_counts(total, summed.sent.step)
    assert total == found.inspection.collectives


def test_a_model_in_several_parts_is_drawn_part_by_part() -> None:
    def make() -> Made:
        return nn.Sequential(OneAttention(break_graph), OneAttention()), {"input": torch.randn(1, 16, 8)}

    found = inspect_pictures(make, seq_len=16, world_size=2, options=Options())
    page = html_page(found, "two parts")
    # The first attention; the layer after the break, which runs whole; and the second attention.
    assert "Part 1 of 3" in words(page)
    assert "Part 3 of 3" in words(page)
    assert "a part without attention runs whole on every rank" in words(page)
    assert page.count('class="row attention') == 2


def test_the_templates_are_installed_with_the_package() -> None:
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["autoseq"]
    folder = Path(autoseq.html_report.__file__).parent
    installed = {file for pattern in patterns for file in folder.glob(pattern)}
    assert {file for file in (folder / "templates").rglob("*") if file.is_file()} <= installed


# Nothing of the model becomes markup, and nothing leaves the page ---------------------------------------------------------


def test_names_and_source_lines_are_text(nasty: str) -> None:
    elements = Elements(nasty).found
    assert [tag for tag, _ in elements].count("script") == 1
    assert not any(tag == "img" for tag, _ in elements)
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert "<script>document" not in nasty
    assert EVIL.replace('"', "&#34;").replace("'", "&#39;").replace("<", "&lt;").replace(">", "&gt;")[:20] in nasty
    assert "document.title='owned'" in unescape(nasty)  # it is there to be read


def test_the_file_names_nothing_outside_itself(nasty: str, llama: str) -> None:
    for page in (nasty, llama):
        elements = Elements(page).found
        fetching = ("href", "src", "srcset", "xlink:href", "action", "data", "poster")
        links = [str(value) for _, attributes in elements for name, value in attributes.items() if name in fetching]
        assert all(link.startswith("#") or link == "data:," for link in links)
        assert "url(" not in page
        assert "@import" not in page
        assert not re.search(r"https?://", unescape(page).replace("http://www.w3.org/2000/svg", ""))
        (policy,) = [attributes["content"] for tag, attributes in elements if attributes.get("http-equiv") == "Content-Security-Policy"]
        assert str(policy).startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in str(policy)


def test_the_page_is_the_same_at_every_run(llama: str) -> None:
    found = inspect_pictures(partial(make_model, "llama", 1, 32), seq_len=32, world_size=2, options=Options(strategy="ring"))
    assert html_page(found, "hf:llama.json") == llama


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> Iterator[chromium.Page]:
    if chromium.FOUND is None:
        pytest.skip("there is no Chromium; Debian's package chromium has it")
    with chromium.browser() as opened:
        yield opened


def test_a_browser_runs_no_script_of_the_model_and_requests_nothing(page: chromium.Page, nasty: str, tmp_path: Path) -> None:
    file = tmp_path / "nasty.html"
    file.write_text(nasty, "utf-8")
    page.requests.clear()
    page.open(file.as_uri())
    assert page.run("document.title") == f"autoseq · {TARGET}"
    assert page.run("document.querySelector('h1').textContent") == TARGET
    assert page.run("document.scripts.length") == 1
    assert {url for url in page.requests if not url.startswith("data:")} == {file.as_uri()}


def test_details_follow_the_mouse_and_the_keyboard_and_a_click_keeps_them(page: chromium.Page, llama: str, tmp_path: Path) -> None:
    file = tmp_path / "llama.html"
    file.write_text(llama, "utf-8")
    page.open(file.as_uri())
    title = "document.querySelector('#details h3').textContent"
    assert page.run(title) == "attention"  # before anything is pointed at
    assert page.run("document.querySelector('#details').checkVisibility()")
    page.point_at('.row[aria-label="q_proj"] .before')
    assert page.run(title) == "q_proj"
    assert "2 · 32 · 32 · 32" in page.run("document.querySelector('#details').textContent")
    page.run("document.querySelector('.row[aria-label=\"k_proj\"]').focus()")
    page.press("Tab")
    assert page.run("document.activeElement.matches('.row, summary')")
    reached = page.run(title)
    assert reached not in ("q_proj", "k_proj")
    page.press("Enter")
    page.point_at('.row[aria-label="q_proj"] .before')
    assert page.run(title) == reached  # kept
    page.press("Escape")
    page.point_at('.row[aria-label="v_proj"] .before')
    assert page.run(title) == "v_proj"


def test_light_and_dark_follow_the_system_until_a_theme_is_chosen(page: chromium.Page, llama: str, tmp_path: Path) -> None:
    file = tmp_path / "llama.html"
    file.write_text(llama, "utf-8")
    background = "getComputedStyle(document.body).backgroundColor"
    seen = []
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        page.open(file.as_uri())
        seen.append(page.run(background))
    light, dark = seen
    assert light != dark
    page.run("document.getElementById('theme').click()")  # light, whatever the system prefers
    assert page.run(background) == light
    page.run("document.getElementById('theme').click()")
    page.prefer("light")
    assert page.run(background) == dark


def test_nothing_is_wider_than_the_window(page: chromium.Page, llama: str, nasty: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    for text in (llama, nasty):
        file.write_text(text, "utf-8")
        for width in (1500, 900, 400):
            page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            page.open(file.as_uri())
            assert page.run("document.documentElement.scrollWidth") <= width
    page.call("Emulation.clearDeviceMetricsOverride")


def test_strategies_are_compared_in_the_layout_that_suits_each() -> None:
    """As a plan compares them: a causal ring with contiguous rows would look twice as slow as it is."""
    (planned, *_) = make_plan(training(batch=1, seq_len=65536).sites, group_size=8, strategy="auto", layout="auto", topology=H100).sites
    times = {time.strategy: time for time in predicted_times(planned)}
    assert planned.layout == "contiguous" and times["ring"].rows == "zigzag" and times[planned.strategy].rows == ""
    for name, time in times.items():
        best = planned.best_offer(name)
        assert best is not None and time.seconds == (planned.seconds if name == planned.strategy else best.offer.seconds)
    assert [time.seconds for time in times.values()] == sorted(time.seconds for time in times.values())

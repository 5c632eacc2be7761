"""The page in a real browser, on models/shakespeare: what it shows is what NumPy computes apart from it.

Needs Debian's chromium, playwright, and for one test axe-core, at GPT2_TEST_AXE: where that is set, as .ci/run does, a
browser that is not there fails the tests, else it skips them.
"""

import json
import os
import pathlib
import re
import shutil
import threading

import numpy as np
import pytest
from conftest import REPO, optional

import gpt2
import sampling
from explorer import single_file, trace
from explorer.server import Server
from explorer.session import Session
from utils import load_encoder_hparams_and_params

playwright = optional("playwright.sync_api")
AXE = os.environ.get("GPT2_TEST_AXE")
CHROMIUM = shutil.which("chromium")
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
TEXT = "My lord, the king is dead; my lord, the"
MINUTE = 60_000  # milliseconds: the machine may be busy


@pytest.fixture(scope="module")
def model():
    return load_encoder_hparams_and_params("shakespeare", REPO / "models")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        assert not AXE, "chromium is not installed"
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as engines:
        browser = engines.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(model):
    with Server(Session("shakespeare", *model, TEXT)) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


class Visit:
    """A page that is open, what it asked for, and what went wrong in it."""

    def __init__(self, browser, url=None, locale="en-US", width=1280, **options):
        self.context = browser.new_context(locale=locale, viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(MINUTE)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        if url:
            self.open(url)

    def open(self, url):
        self.page.goto(url)
        self.settle()

    def settle(self):
        """Until every section shows what it has for the run that is shown."""
        self.page.wait_for_selector("#seen table")
        self.page.wait_for_selector("#status:not([data-busy])", state="attached")

    def type(self, text):
        self.page.fill("#prompt", text)
        self.page.click("#run")
        self.settle()

    def texts(self, selector):
        return self.page.locator(selector).all_inner_texts()

    def import_(self, module, expression):
        """The value of an expression on what a module of the page exports, as m."""
        return self.page.evaluate(f"import('./{module}.js').then((m) => {expression})")


@pytest.fixture(scope="module")
def tab(browser):
    tab = Visit(browser)
    yield tab
    tab.context.close()


@pytest.fixture
def visit(tab, url):
    """The page, opened anew, in a tab that tests share: one for each would take twice as long."""
    tab.requests.clear()
    tab.errors.clear()
    tab.open(url)
    yield tab
    tab.page.unroute_all(behavior="ignoreErrors")
    tab.page.evaluate("localStorage.clear()")  # the language; and errors up to here have arrived by then
    errors = [*tab.errors]
    tab.page.goto("about:blank")  # or what still goes on in it would ask the same server beside the next test
    assert errors == []


def number(text):
    return float(text.replace("−", "-").replace(" %", "e-2").replace("∞", "inf"))


def ids_of(model, text):
    return model[0].encode(text)


def logits_of(model, ids):
    return gpt2.gpt2(ids, **model[2], n_head=model[1]["n_head"])


def readable(model, i):
    return model[0].decode([i]).replace(" ", "·").replace("\n", "↵")


def test_a_prompt_that_is_typed_shows_its_tokens(visit, model):
    text = "Good night,\nmy sweet remembrance"
    visit.type(text)
    ids = ids_of(model, text)
    assert visit.texts("#chips .text") == [readable(model, i) for i in ids]
    assert visit.texts("#chips .id") == [str(i) for i in ids]


def test_parts_of_a_character_are_shown_as_their_bytes(visit):
    visit.type("你")
    assert visit.texts("#chips .text") == ["‹E4›", "‹BD›", "‹A0›"]


def test_a_word_has_its_characters_where_its_tokens_are_bytes(visit):
    visit.type("中文")
    assert visit.texts("#token summary") == ["How 中文 became its tokens"]


def test_the_merges_of_a_word_are_shown_step_by_step(visit, model):
    visit.type("ROMEO: remembrance")
    visit.page.click("#token summary")
    steps = visit.texts("#token .merges li .symbols")
    assert steps[0].split() == list("·remembrance")
    assert steps[-1].split() == [readable(model, i) for i in ids_of(model, " remembrance")]


def table_of(visit, selector):
    """The numbers of the table behind a heat map."""
    if not visit.page.locator(f"{selector} .numbers table").count():
        visit.page.click(f"{selector} .numbers summary")
        visit.page.wait_for_selector(f"{selector} .numbers table")
    rows = visit.page.locator(f"{selector} .numbers tbody tr").all()
    return np.array([[number(cell) for cell in row.locator("td").all_inner_texts()] for row in rows])


def test_the_weights_of_a_head_are_numpys_and_a_row_sums_to_1(visit, model):
    visit.type("My lord, the king is")
    ids = ids_of(model, "My lord, the king is")
    visit.page.click("#blocks >> text=2")
    visit.settle()
    visit.page.click("#thumbs button >> nth=3")
    run = trace.record(ids, **model[2], n_head=model[1]["n_head"])
    weights = run["block 2", "attention", "weights"][3]
    np.testing.assert_allclose(table_of(visit, "#head"), weights, rtol=6e-3, atol=1e-3)
    assert "sum 1.000" in visit.texts("#head .rowsum")[0]


def test_of_a_text_that_attention_takes_in_parts_each_row_has_the_name_of_its_token(visit, model):
    text = " ".join(f"My lord {i}, the king {i}" for i in range(12))
    visit.type(text)
    ids = ids_of(model, text)
    run = trace.record(ids, **model[2], n_head=model[1]["n_head"])
    ends = [call.last("weights").shape[-1] for call in trace.block_call(run, 0).within("attention")]
    assert len(ends) > 1
    for call, start, end in zip(("attention", "attention #2"), [0, ends[0]], ends, strict=True):
        visit.page.click(f"#tree button:text-is('{call}')")
        visit.page.locator(".line.ran", has_text="weights = softmax(scores)").locator(".value").first.click()
        visit.page.wait_for_selector(f"#picture .axes:has-text('n_q = {end - start} × n_k = {end}')")
        visit.page.click("#picture .numbers summary")
        names = visit.texts("#picture .numbers tbody th")
        assert names == [f"{readable(model, ids[i])} ({i})" for i in range(start, end)]
    visit.page.focus("#picture canvas.heat")
    for key in ["ArrowUp"] * (ends[1] - ends[0]) + ["Enter"]:  # to the first row
        visit.page.keyboard.press(key)
    visit.page.wait_for_selector("#chips button[aria-pressed=true]")
    assert visit.page.locator("#chips button").nth(ends[0]).get_attribute("aria-pressed") == "true"


def test_what_attention_2_is_of_a_long_text_is_said_where_it_is_met(visit):
    attention = "#tree button:text-is('attention')"
    visit.page.click(attention)
    assert "queries" not in visit.texts("#code .what")[0]
    visit.type("my lord " * 40)
    n = visit.page.locator("#chips .token").count()
    for call in (attention, "#tree button:text-is('attention #2')", "#tree button:text-is('causal_attention')"):
        visit.page.click(call)
        said = f"attention has those of the tokens 0 to 63; attention #2 has those of the tokens 64 to {n - 1}."
        assert visit.texts("#code .what")[0].endswith(said)
    visit.page.click("[data-language=zh]")
    assert f"attention 是词元 0 到 63 的；attention #2 是词元 64 到 {n - 1} 的。" in visit.texts("#code .what")[0]


def test_in_a_long_text_each_row_of_weights_has_all_colours_up_to_its_largest_number(visit, model):
    text = " ".join(f"My lord {i}, the king {i}" for i in range(12))
    visit.type(text)
    ids = ids_of(model, text)
    weights = trace.attention_weights(trace.record(ids, **model[2], n_head=model[1]["n_head"]), 0)[2]
    assert weights[-1].max() < 0.1 < weights.max() / 9  # on one scale for all rows the last would be pale
    visit.page.click("#thumbs button >> nth=2")
    numbers = f"Float32Array.from({json.dumps(weights.ravel().tolist())})"
    n = len(ids)
    script = f"[...m.pixels({numbers}, {n}, {n}).getContext('2d').getImageData(0, 0, {n}, {n}).data]"
    red = np.array(visit.import_("heat", script)).reshape(n, n, 4)[..., 0]
    shares = weights / weights.max(axis=-1, keepdims=True)
    np.testing.assert_allclose(red, 255 + shares * (23 - 255), atol=0.6)  # from white to the blue of page.css
    assert "the largest of its row" in visit.texts("#head .legend")[0]


def test_a_row_of_the_stream_says_how_long_a_tokens_row_is_on_average(visit, model):
    visit.type(TEXT)
    run = trace.record(ids_of(model, TEXT), **model[2], n_head=model[1]["n_head"])
    x = [value.array for value in run.root.values if value.name == "x"][1]
    mean = np.linalg.norm(x, axis=-1).mean()
    visit.page.wait_for_selector("#stream .rowsum")
    assert visit.texts("#stream .rowsum") == [f"block 0: a token's row is {mean:.1f} long on average"]
    assert visit.texts("#head .rowsum")[0].endswith(": sum 1.000")


def test_the_source_stays_where_it_is_scrolled_to_while_its_lines_are_chosen(visit):
    visit.page.click("#tree >> text=mha")
    visit.page.evaluate("document.querySelector('#code .lines').scrollTop = 200")
    visit.page.locator(".line.ran .value").last.click()
    visit.settle()
    assert visit.page.evaluate("document.querySelector('#code .lines').scrollTop") > 100


def test_a_line_selects_its_picture_and_says_what_it_does_to_the_axes(visit, model):
    visit.page.click("#tree >> text=mha")
    line = visit.page.locator(".line.ran", has_text="x = x.reshape(*x.shape[:-1], 3")
    line.locator(".value").click()
    visit.page.wait_for_selector("#picture .change")
    assert "3*n_embd is split into 3 × n_head × n_embd/n_head" in visit.texts("#picture .change p")[0]
    assert "n_seq = 12 × 3 × n_head = 5 × n_embd/n_head = 32" in visit.texts("#picture .axes")[0]
    assert visit.page.locator(".line.here code").inner_text().strip().startswith("x = x.reshape")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_line_that_takes_q_k_and_v_apart_shows_which_axis_goes_and_which_change_places(visit, name):
    visit.page.click("#tree >> text=mha")
    line = visit.page.locator(".line.ran", has_text="q, k, v = (x[..., i, :, :].swapaxes(-3, -2)")
    line.locator(".value", has=visit.page.locator(f"b:text-is('{name}')")).click()
    visit.page.wait_for_selector(f"#picture h3:has-text('{name}')")
    boxes = visit.page.locator("#picture .change svg text").all_text_contents()
    assert boxes == ["n_seq 12", "3", "n_head 5", "n_embd/n_head 32", "n_head 5", "n_seq 12", "n_embd/n_head 32"]
    assert visit.page.locator("#picture .change rect.taken").count() == 1
    assert visit.page.locator("#picture .change line").count() == 3
    left = "[n_seq, n_head, n_embd/n_head], becomes [n_head, n_seq, n_embd/n_head]"
    assert visit.texts("#picture .change p")[0].startswith(
        f"{name} is one of the 3 along the axis 3. What is left, {left}"
    )


def test_the_source_is_gpt2_py_as_it_stands_on_disk(visit):
    visit.page.check("#whole")
    lines = visit.page.locator("#code .line code").all_inner_texts()
    on_disk = pathlib.Path(gpt2.__file__).read_text("utf-8").splitlines()
    assert [line.rstrip("\n") for line in lines] == on_disk


def test_the_call_tree_leads_to_a_function_in_another_block(visit, model):
    visit.page.click("#tree >> text=block 3")
    visit.settle()
    visit.page.click("#tree >> text=gelu")
    assert visit.texts("#path ol li") == ["gpt2", "block 3", "ffn", "gelu"]
    a = trace.record(ids_of(model, TEXT), **model[2], n_head=model[1]["n_head"])["block 3", "gelu", "return"]
    visit.page.wait_for_selector("#picture .numbers")
    np.testing.assert_allclose(table_of(visit, "#picture"), a[:, :12], rtol=6e-3, atol=1e-3)


def test_the_probabilities_of_what_comes_next_are_numpys(visit, model):
    visit.type(TEXT)
    p = gpt2.softmax(logits_of(model, ids_of(model, TEXT)))[-1]
    best = np.argsort(-p)[:20]
    assert visit.texts("#chances .bar .name") == [readable(model, i) for i in best]
    shown = [number(text) for text in visit.texts("#chances .bar .amount")]
    np.testing.assert_allclose(shown, p[best], atol=6e-4)


def test_the_sliders_cut_as_sampling_draw_cuts_on_200_settings(visit, model):
    logits = logits_of(model, ids_of(model, TEXT))[-1]
    rng = np.random.default_rng(0)
    settings = [
        {
            "temperature": round(float(rng.uniform(0.05, 2)), 2),
            "top_k": int(rng.choice([0, rng.integers(1, 60), rng.integers(1, 1024)])),
            "top_p": round(float(rng.choice([1, rng.uniform(0.01, 1)])), 2),
        }
        for _ in range(200)
    ]
    script = f"{json.dumps(settings)}.map((s) => [...m.cut(Float32Array.from({json.dumps(logits.tolist())}), s).may])"
    for setting, may in zip(settings, visit.import_("sampling", script), strict=True):
        may = np.array(may)
        ends = np.cumsum(may) / may.sum()
        ids = np.flatnonzero(may > 1e-9 * may.sum())  # of a shorter stretch of the line no point can be told
        middles = ends[ids] - may[ids] / may.sum() / 2  # draw must find each token in the middle of its own
        assert [int(sampling.draw(logits, [point], **setting)) for point in middles] == ids.tolist(), setting
        if setting["top_k"] and setting["top_p"] == 1:
            assert np.count_nonzero(may) == setting["top_k"]


def test_the_sliders_move_the_bars_and_say_where_they_cut(visit):
    visit.page.fill("#controls .control:nth-child(2) input[type=number]", "5")
    visit.page.wait_for_selector("#chances li.cut")
    assert visit.texts("#chances p")[0].startswith("5 of 1,024 tokens may be drawn")
    assert visit.page.locator("#chances .bar.isCut").count() == 15
    visit.page.fill("#controls .control:nth-child(1) input[type=number]", "0")
    assert "always taken" in visit.texts("#chances p")[0]


def test_a_token_that_is_clicked_is_taken(visit, model):
    visit.type(TEXT)
    visit.page.click("#chances .bar button >> nth=1")
    visit.settle()
    ids = ids_of(model, TEXT)
    second = int(np.argsort(-logits_of(model, ids)[-1])[1])
    assert visit.texts("#chips .id") == [str(i) for i in [*ids, second]]


def test_why_shows_the_parts_that_gave_most_to_the_likeliest_token(visit, model):
    visit.type(TEXT)
    visit.page.wait_for_selector("#reasons .bar")
    session = Session("shakespeare", *model)
    session.answer("run", {"text": TEXT})
    told = session.answer("why", {"ids": ids_of(model, TEXT)})
    amounts = [*np.ravel(told["heads"]), *told["mlps"], *told["embeddings"]]
    strongest = sorted(amounts, key=abs, reverse=True)[:10]
    shown = [number(text) for text in visit.texts("#reasons .two > div:first-child .amount")]
    np.testing.assert_allclose(shown, strongest, rtol=6e-3)
    logits = logits_of(model, ids_of(model, TEXT))[-1]
    lead = float(re.search(r"less the mean of all, is [+](\S+):", visit.texts("#reasons p")[1])[1])
    assert lead == pytest.approx(logits.max() - logits.mean(), rel=6e-3)


def test_why_compares_a_token_with_another(visit, model):
    visit.type(TEXT)
    logits = logits_of(model, ids_of(model, TEXT))[-1]
    best, second = np.argsort(-logits)[:2].tolist()
    visit.page.focus("#whyOther")
    visit.page.select_option("#whyOther", str(second))
    visit.page.wait_for_selector("#reasons p:has-text('times as likely')")
    said = " ".join(visit.texts("#reasons p"))
    assert f"The logit of {readable(model, best)}" in said
    assert float(re.search(r"it is (\S+) times", said)[1]) == pytest.approx(
        np.exp(logits[best] - logits[second]), rel=6e-3
    )
    assert visit.page.evaluate("document.activeElement.id") == "whyOther"


def test_a_head_that_gave_much_is_opened_by_a_click(visit):
    visit.page.wait_for_selector("#reasons .bar")
    button = visit.page.locator("#reasons .bar button", has_text="head").first
    block, head = re.match(r"block (\d+), head (\d+)", button.inner_text()).groups()
    button.click()
    visit.settle()
    assert visit.texts("#head h3")[0] == f"Attention of block {block}, head {head}"


def test_the_lens_shows_what_shorter_models_say(visit, model):
    visit.type(TEXT)
    ids, (_, hparams, params) = ids_of(model, TEXT), model
    rows = visit.page.locator("#seen tbody tr").all()
    assert len(rows) == hparams["n_layer"] + 1
    for i, row in enumerate(rows):
        p = gpt2.softmax(gpt2.gpt2(ids, **{**params, "blocks": params["blocks"][:i]}, n_head=hparams["n_head"]))[-8:]
        cells = [cell.removeprefix("✓").strip().split("\n") for cell in row.locator("td").all_inner_texts()]
        assert [cell[0] for cell in cells] == [readable(model, int(best)) for best in p.argmax(axis=-1)]
        np.testing.assert_allclose([number(cell[-1]) for cell in cells], p.max(axis=-1), atol=6e-4)


def test_a_cell_of_the_lens_leads_to_its_block(visit):
    visit.page.click("#seen tbody tr:nth-child(3) button >> nth=0")
    visit.settle()
    assert visit.texts("#blocks [aria-pressed=true]") == ["1"]


def test_a_head_switched_off_shows_the_probabilities_without_it(visit, model):
    visit.type(TEXT)
    visit.page.click("#blocks >> text=1")
    visit.settle()
    visit.page.click("#thumbs button >> nth=2")
    visit.page.click("#head .act")
    visit.page.wait_for_selector("#compared table")
    assert "block 1, head 2" in visit.texts("#compared h3")[0]
    ids, (_, hparams, params) = ids_of(model, TEXT), model
    off = gpt2.softmax(logits_of((None, hparams, trace.without_head(params, 5, 1, 2)), ids))[-1]
    on = gpt2.softmax(logits_of(model, ids))[-1]
    names = {readable(model, i): i for i in range(hparams["n_vocab"])}
    rows = visit.page.locator("#compared tbody tr").all()
    assert len(rows) >= 8
    for row in rows:
        i = names[row.locator("th").inner_text()]
        before, after = (number(text) for text in row.locator(".amount").all_inner_texts())
        assert (before, after) == (pytest.approx(on[i], abs=6e-4), pytest.approx(off[i], abs=6e-4))


def test_a_row_of_another_text_is_patched_in_the_last_into_the_last_unless_told_otherwise(visit):
    visit.type(TEXT)
    visit.page.click("#patchForm button")
    visit.page.wait_for_selector("#compared table")
    assert visit.texts("#compared h3")[0] == "The row of ·my in place of that of ·the"
    visit.page.fill("#otherText", "Good night, my")
    visit.page.select_option("#patchTo", "4")
    visit.page.fill("#patchFrom", "0")
    visit.page.click("#patchForm button")
    visit.page.wait_for_selector("#compared h3:has-text('·king')")
    assert visit.texts("#compared h3")[0] == "The row of G in place of that of ·king"


def test_what_an_experiment_changed_is_in_view(visit):
    visit.page.click("#head .act")
    visit.page.wait_for_selector("#compared table")
    box = visit.page.locator("#compared table").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 901
    visit.page.click("#offForm button")
    visit.page.wait_for_selector("#compared h3:has-text(';')")
    assert 0 <= visit.page.locator("#compared h3").bounding_box()["y"] <= 800


def test_a_new_text_or_language_leaves_the_page_where_it_is(visit):
    visit.page.click("#head .act")
    visit.page.wait_for_selector("#compared table")
    visit.page.evaluate("scrollTo(0, 0)")
    visit.type("Good night, my")
    visit.page.wait_for_selector("#compared th:text-is('·lord')")
    assert visit.page.evaluate("scrollY") == 0
    visit.page.click("[data-language=zh]")
    visit.page.wait_for_selector("#compared h3:has-text('块')")
    visit.settle()
    assert visit.page.evaluate("scrollY") == 0


def test_a_comparison_that_comes_after_a_newer_text_is_not_shown(visit):
    visit.page.wait_for_selector("#patchForm button")
    held = []
    visit.page.route("**/api/compare", lambda route: held.append(route))
    with visit.page.expect_request("**/api/compare"):
        visit.page.click("#patchForm button")
    visit.type(f"{TEXT} king")
    with visit.page.expect_response("**/api/compare"):
        held[0].continue_()
    visit.page.evaluate("new Promise((done) => setTimeout(done, 500))")
    assert not visit.page.locator("#compared h3").count()


def test_the_page_generates_the_ids_of_generate(visit, model):
    visit.type(TEXT)
    visit.page.fill("#controls .control:nth-child(1) input[type=number]", "0")
    visit.page.click("#going .act >> nth=1")
    visit.page.wait_for_selector("#growing mark >> nth=9")
    ids = gpt2.generate(ids_of(model, TEXT), model[2], model[1]["n_head"], 10)
    assert visit.texts("#growing mark") == [readable(model, i) for i in ids]
    assert "21 tokens were" not in visit.texts("#cached p")[0]
    assert visit.texts("#cached p")[0].startswith("20 tokens were in the cache, 1 went through the model")


def ask_what_cannot_be(visit):
    visit.page.fill("#otherText", "a")
    visit.page.fill("#patchFrom", "99")
    visit.page.click("#patchForm button")
    visit.page.wait_for_selector("#status.error")


def test_what_is_wrong_is_said_on_the_page_and_the_next_text_runs(visit):
    ask_what_cannot_be(visit)
    assert "from must be a whole number from 0 to 0, not 99" in visit.texts("#status")[0]
    visit.errors.clear()  # the browser notes the status 400 itself
    visit.type("ROMEO:")
    assert not visit.page.locator("#status.error").count()


def test_what_is_wrong_is_said_in_the_language_of_the_page(visit):
    visit.page.click("[data-language=zh]")
    visit.settle()
    ask_what_cannot_be(visit)
    assert "那里第几个词元 必须是 0 到 0 的整数，而不是 99" in visit.texts("#status")[0]
    visit.errors.clear()  # the browser notes the status 400 itself


def test_of_texts_that_are_run_while_one_runs_the_last_is_shown(visit, model):
    held, is_held = [], True
    visit.page.route("**/api/run", lambda route: held.append(route) if is_held else route.continue_())
    with visit.page.expect_request("**/api/run"):
        visit.page.fill("#prompt", "ROMEO: Good")
        visit.page.press("#prompt", "Enter")
    for text in ("my lord", "Good night, my"):
        visit.page.fill("#prompt", text)
        visit.page.press("#prompt", "Enter")
    is_held = False
    held[0].continue_()
    visit.page.wait_for_selector("#chips .token:nth-child(5):last-child")
    visit.settle()
    visit.errors.clear()  # the browser notes that numbers of a run that another replaced are gone
    assert sum(request.endswith("/api/run") for request in visit.requests) == 3  # at first, held, last
    assert not visit.page.locator("#status.error").count()
    assert visit.texts("#chips .id") == [str(i) for i in ids_of(model, "Good night, my")]


@pytest.fixture
def asked(visit):
    """Has the page get 2^22 zeros for every array, for array 1000 only after release(): the keys that it asks for.

    Within the page: by way of the browser's protocol, so many take seconds.
    """
    visit.page.evaluate("""() => {
      const real = fetch;
      const released = new Promise((resolve) => { globalThis.release = resolve; });
      globalThis.asked = [];
      globalThis.fetch = async (path, options) => {
        if (path !== "/api/array") return real(path, options);
        const { key } = JSON.parse(options.body);
        asked.push(key);
        if (key === 1000) await released;
        return new Response(new ArrayBuffer(2 ** 24));
      };
    }""")
    return lambda: visit.page.evaluate("asked")


def test_of_numbers_that_were_fetched_the_page_keeps_the_newest_alone(visit, asked):
    for key in (1001, 1002, 1003, 1004, 1005, 1005, 1001):
        visit.import_("api", f"m.numbers({key}).then((data) => data.length)")
    assert asked() == [1001, 1002, 1003, 1004, 1005, 1001]


def test_numbers_that_come_after_they_were_forgotten_take_no_room(visit, asked):
    visit.import_("api", "void (globalThis.late = m.numbers(1000))")
    visit.import_("api", "m.forget()")
    visit.import_("api", "m.numbers(1001).then((data) => data.length)")
    visit.page.evaluate("release()")
    assert visit.page.evaluate("late.then((data) => data.length)") == 2**22
    for key in (1002, 1003, 1004, 1001):
        visit.import_("api", f"m.numbers({key}).then((data) => data.length)")
    assert asked() == [1000, 1001, 1002, 1003, 1004]


def test_a_first_text_that_is_refused_is_said(browser, url):
    context = browser.new_context()
    page = context.new_page()
    page.route("**/api/first", lambda route: route.fulfill(status=400, json={"template": "nothing has run yet"}))
    page.goto(url)
    page.wait_for_selector("#status.error", timeout=20_000)
    assert page.locator("#status").inner_text() == "nothing has run yet"
    context.close()


def test_a_setting_that_cannot_be_is_not_left_standing(visit):
    box = "#controls .control:nth-child(1) input[type=number]"
    visit.page.fill(box, "7")
    visit.page.press(box, "Tab")
    assert visit.page.input_value(box) == visit.page.input_value("#temperature") == "1"


@pytest.mark.parametrize("button", ["#chips button >> nth=2", "#thumbs button >> nth=3", "#habits td button >> nth=4"])
def test_a_token_or_a_head_of_the_open_block_that_is_chosen_keeps_the_focus(visit, button):
    visit.page.click(button)
    visit.settle()
    assert visit.page.locator(button).evaluate("e => e === document.activeElement && e.ariaPressed") == "true"


@pytest.mark.parametrize(
    "button",
    [
        "#habits tbody tr:nth-child(3) td button >> nth=1",
        "#habits .chooser button >> nth=2",
        "#blocks button >> nth=2",
        "#tree .node >> text=block 2",
        "#picture .chooser button >> nth=3",
        "#code .value >> nth=2",
        "#seen tbody tr:nth-child(4) td button >> nth=1",
        "#reasons .bar button >> nth=0",
        "#going .act >> nth=0",
    ],
)
def test_what_was_pressed_keeps_the_focus_where_all_around_it_is_made_anew(visit, button):
    visit.page.focus(button)
    visit.page.keyboard.press("Enter")
    visit.settle()
    visit.page.wait_for_selector("#growing mark" if "#going" in button else "#growing")
    assert visit.page.locator(button).evaluate("e => e === document.activeElement")


def test_a_table_keeps_the_focus_as_it_opens_and_turns(visit):
    visit.page.locator("#code .value").first.click()  # many columns
    visit.settle()
    visit.page.focus("#picture .numbers summary")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#picture .numbers table")
    assert visit.page.locator("#picture .numbers summary").evaluate("e => e === document.activeElement")
    visit.page.focus("#picture .numbers .turns button >> nth=1")
    for first, focused in ((12, 1), (24, 0)):  # of 32: behind the last there is no way but back
        visit.page.keyboard.press("Enter")
        assert visit.page.locator("#picture .numbers thead th").first.inner_text().endswith(str(first))
        button = visit.page.locator(f"#picture .numbers .turns button >> nth={focused}")
        assert button.evaluate("e => e === document.activeElement")


def test_the_card_of_the_walk_keeps_the_focus_where_another_value_is_shown(visit):
    visit.page.click("#start")
    visit.settle()
    visit.page.focus("#walk .act")
    visit.page.locator("#code .value").nth(1).evaluate("e => e.click()")
    visit.settle()
    assert visit.page.locator("#walk .act").evaluate("e => e === document.activeElement")


def test_the_cache_says_with_which_settings_it_draws(visit):
    assert "Draws at temperature 1, top_k 0, top_p 1" in visit.texts("#going")[0]
    visit.page.fill("#controls .control:nth-child(1) input[type=number]", "0")
    assert "Takes the likeliest" in visit.texts("#going")[0]


def test_layer_norm_shows_the_axis_that_it_works_along(visit):
    visit.page.click("#tree >> text=layer_norm >> nth=0")
    visit.page.wait_for_selector("#picture .along .worked")
    texts = visit.page.locator("#picture .along text").all_text_contents()
    assert texts == ["n_embd 160", "n_seq 12"]
    assert visit.texts("#picture .along p")[0].startswith("Along n_embd, each row apart")


def test_a_text_too_long_is_cut_and_that_is_said(visit):
    visit.type("my lord " * 200)
    assert "Cut to the first 128 tokens" in visit.texts("#status")[0]
    assert visit.page.locator("#chips .token").count() == 128


def test_the_walk_has_ten_steps_and_can_be_left(visit):
    visit.page.click("#start")
    for i in range(1, 11):
        assert visit.texts("#walk .hint") == [f"Step {i} of 10"]
        visit.page.click("#walk .act")
        visit.settle()
    assert visit.page.locator("#walk").is_hidden()


def test_on_a_narrow_screen_the_card_of_the_walk_stands_before_what_it_is_about_and_covers_nothing(browser, url):
    visit = Visit(browser, url, width=360)
    visit.page.set_viewport_size({"width": 360, "height": 640})
    visit.page.click("#start")
    for i in range(1, 11):
        visit.settle()
        card, subject = (visit.page.locator(what).bounding_box() for what in ("#walk", ".walked"))
        assert -1 <= card["y"] <= 20, i
        assert 0 <= subject["y"] - card["y"] - card["height"] < 30, i
        visit.page.evaluate("scrollBy(0, 300)")
        assert visit.page.locator("#walk").bounding_box()["y"] == pytest.approx(card["y"] - 300, abs=1)
        if i == 6:  # another line: the card stays where it was
            visit.page.locator(".line.ran .value").first.click()
            visit.settle()
            assert visit.page.evaluate(
                "document.querySelector('#walk + [data-line] code').innerText.includes('softmax')"
            )
            visit.page.check("#whole")
            visit.page.uncheck("#whole")
            assert visit.page.locator("#walk + [data-line]").count() == 1
        visit.page.click("#walk .act")
    assert visit.page.locator("#walk").is_hidden()
    visit.context.close()


@pytest.mark.parametrize("height", [650, 800])
def test_on_a_low_screen_the_card_of_the_walk_covers_nothing_either(height, browser, url):
    visit = Visit(browser, url)
    visit.page.set_viewport_size({"width": 1280, "height": height})
    visit.page.click("#start")
    for i in range(1, 11):
        visit.settle()
        card, subject = (visit.page.locator(what).bounding_box() for what in ("#walk", ".walked"))
        assert card["y"] >= -1, i
        assert subject["y"] >= card["y"] + card["height"], i
        assert subject["y"] + min(subject["height"], 100) <= height, i
        visit.page.evaluate("document.querySelector('.lines').scrollTo(0, 9999)")  # from where a line is brought back
        visit.page.click("#walk .act")
    visit.context.close()


def test_the_walk_shows_what_each_step_is_about_above_its_card(browser, url):
    visit = Visit(browser, url)
    visit.page.click("#start")
    for i in range(1, 11):
        visit.settle()
        card, subject = (visit.page.locator(what).bounding_box() for what in ("#walk", ".walked"))
        assert subject["y"] >= -1, i
        assert card["y"] - subject["y"] >= min(subject["height"], 300), i
        visit.page.click("#walk .act")
    visit.context.close()


def test_the_page_can_be_used_by_keyboard_alone(visit):
    visit.page.focus("#prompt")
    visit.page.keyboard.press("Control+A")
    visit.page.keyboard.type("Good night, my")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#chips .token:nth-child(5):last-child")
    visit.settle()
    visit.page.focus("#head canvas.heat")
    for key in ("ArrowUp", "ArrowRight", "Enter"):
        visit.page.keyboard.press(key)
    visit.page.wait_for_selector("#chips .token:nth-child(4)[aria-pressed=true]")
    visit.settle()
    for key in ("ArrowRight", "ArrowUp"):  # on from where it was
        visit.page.keyboard.press(key)
    assert re.search(r"\(2\) → .*\(2\): ", visit.texts("#head .readout")[0])


@pytest.mark.parametrize(("locale", "language"), [("zh-CN", "zh-CN"), ("en-GB", "en"), ("fr-FR", "en")])
def test_the_browsers_language_decides_at_first(browser, url, locale, language):
    visit = Visit(browser, url, locale=locale)
    assert visit.page.locator("html").get_attribute("lang") == language
    visit.context.close()


def test_both_languages_say_the_same_things(visit):
    english, chinese = (set(re.findall(r"^    (\w+):", half, re.MULTILINE)) for half in halves())
    assert english == chinese
    used = set(re.findall(r'\bt\("(\w+)"', single_file.joined()))
    used |= set(re.findall(r'data-word="(\w+)"', (single_file.PAGE / "index.html").read_text("utf-8")))
    assert used <= english
    assert {f"about_{name}" for name in trace.FUNCTIONS if name in visited()} <= english


def halves():
    text = (single_file.PAGE / "words.js").read_text("utf-8")
    return text.split("  zh: {")


def visited():
    """The functions of gpt2.py that a run calls."""
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare", REPO / "models")
    run = trace.record(encoder.encode("My"), **params, n_head=hparams["n_head"])
    return {call.function.name for call in run.root.walk()}


def test_the_switch_of_languages_leaves_nothing_in_the_other_one(visit):
    visit.page.click("[data-language=zh]")
    visit.settle()
    headings = visit.texts("h1, h2, .intro, summary")
    assert all(re.search(r"[\u4e00-\u9fff]", heading) for heading in headings if heading), headings


def test_no_request_leaves_this_machine(visit):
    visit.type("ROMEO:")
    assert {re.match(r"(\w+:/*[^/:]*)", request)[1] for request in visit.requests} <= {"http://127.0.0.1", "data:image"}


def test_a_saved_page_opens_from_disk_with_no_request_at_all(browser, model, tmp_path):
    (tmp_path / "page.html").write_text(single_file.page(Session("shakespeare", *model, TEXT)), "utf-8")
    visit = Visit(browser, (tmp_path / "page.html").as_uri(), offline=True)
    assert [request for request in visit.requests if not request.startswith("data:")] == [visit.page.url]
    visit.page.click("#blocks >> text=3")
    visit.page.click("#thumbs button >> nth=1")
    run = trace.record(ids_of(model, TEXT), **model[2], n_head=model[1]["n_head"])
    weights = run["block 3", "attention", "weights"][1]
    np.testing.assert_allclose(table_of(visit, "#head"), weights, rtol=6e-3, atol=1e-3)
    assert visit.page.locator("#experiments").is_hidden()
    assert visit.errors == []
    visit.context.close()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "page.html"
    path.write_text(single_file.page(Session("shakespeare", *model, TEXT)), "utf-8")
    return path.as_uri()


@pytest.mark.parametrize(
    ("locale", "promises"),
    [
        ("en-US", ["Type a text", "Enter runs", "to take it", "Now take a token", "switched off", "Change it", "Draw"]),
        ("zh-CN", ["输入一段文字", "回车运行", "就选它", "现在选一个词元", "关掉", "随时可以改", "抽一个"]),
    ],
)
def test_a_saved_page_promises_nothing_that_needs_the_program(browser, url, saved, locale, promises):
    said = []
    for address in (url, saved):
        visit = Visit(browser, address, locale=locale)
        said.append(visit.page.inner_text("body"))
        visit.page.click("#start")
        for _ in range(8):
            said[-1] += visit.page.inner_text("#walk")
            visit.page.click("#walk .act")
        visit.context.close()
    assert [text in said[0] for text in promises] == [True] * len(promises)
    assert [text for text in promises if text in said[1]] == []
    assert "python explore.py" in said[1]


def test_a_saved_page_takes_no_other_text_and_says_why_in_either_language(browser, saved):
    visit = Visit(browser, saved)
    visit.page.focus("#prompt")
    visit.page.keyboard.type("Another text")
    visit.page.keyboard.press("Enter")
    assert visit.page.input_value("#prompt") == TEXT
    assert visit.page.locator("#run").is_hidden()
    assert "Another text or an experiment needs python explore.py" in visit.texts("#status")[0]
    visit.page.click("[data-language=zh]")
    assert "换一段文字或做实验，要运行 python explore.py" in visit.texts("#status")[0]
    assert visit.errors == []
    visit.context.close()


def test_the_lens_of_a_saved_page_goes_to_any_token(browser, saved, model):
    visit = Visit(browser, saved)
    visit.page.click("#chips button >> nth=1")
    visit.settle()
    session = Session("shakespeare", *model)
    session.answer("run", {"text": TEXT})
    rows = session.answer("lens", {"ids": ids_of(model, TEXT), "positions": [1]})["rows"]
    cells = [cell.removeprefix("✓ ").split("\n")[0] for cell in visit.texts("#seen td.here")]
    assert cells == [readable(model, row[0]["id"]) for row in rows]
    visit.context.close()


def test_a_saved_page_says_what_it_had_no_room_for(browser, model, tmp_path, monkeypatch):
    monkeypatch.setattr(single_file, "N_BYTES", 40_000)
    (tmp_path / "page.html").write_text(single_file.page(Session("shakespeare", *model, TEXT)), "utf-8")
    visit = Visit(browser, (tmp_path / "page.html").as_uri(), offline=True)
    visit.page.click("#tree >> text=gelu")
    said = "Only the shape is known here: the file had no room for the numbers. python explore.py has them."
    assert visit.texts("#picture .hint") == [said]
    assert visit.errors == []
    visit.context.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_the_list_of_contents_leads_to_each_section_by_keyboard(browser, url, width):
    visit = Visit(browser, url, width=width)
    assert visit.page.locator("#contents").bounding_box()["height"] < 45  # one line
    links = visit.page.locator("#contents a").all()
    assert len(links) == visit.page.locator("section h2").count() == 9
    for before, link, title in zip([None, *links], links, visit.texts("section h2"), strict=False):
        visit.page.focus("[data-language=zh]") if before is None else before.focus()
        visit.page.keyboard.press("Tab")
        assert link.evaluate("e => e === document.activeElement")
        box = link.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        visit.page.keyboard.press("Enter")
        assert visit.page.evaluate("document.activeElement.innerText") == title
        assert 0 <= visit.page.locator("h2:focus").bounding_box()["y"] < 900
    visit.context.close()


@pytest.mark.parametrize("link", [".skip", "#contents a >> nth=1"])
def test_a_page_that_is_loaded_anew_after_a_link_within_it_still_has_its_key(visit, link):
    visit.page.focus(link)
    visit.page.keyboard.press("Enter")
    visit.page.reload()
    visit.settle()
    assert visit.page.locator("#chips .token").count() == 12


@pytest.mark.parametrize("width", [360, 640, 1280])
def test_the_page_is_never_wider_than_the_screen(browser, url, width):
    visit = Visit(browser, url, width=width)
    visit.page.click("#tree >> text=mha") if visit.page.locator("#tree").is_visible() else None
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.context.close()


def test_on_a_narrow_screen_a_picture_stands_under_the_line_that_made_it(browser, url):
    visit = Visit(browser, url, width=360)
    assert visit.page.locator("#tree").is_hidden()
    line = visit.page.locator(".line.ran", has_text="scores += mask")
    line.locator(".value").click()
    visit.page.wait_for_selector("#picture h3:has-text('scores')")
    above, below = line.bounding_box(), visit.page.locator("#picture").bounding_box()
    assert 0 <= below["y"] - above["y"] - above["height"] < 20
    visit.context.close()


def test_a_table_wider_than_the_screen_says_that_it_scrolls(browser, url):
    for width, is_hidden in ((360, False), (1280, True)):
        visit = Visit(browser, url, width=width)
        assert visit.page.locator("#habits .sign").is_hidden() == is_hidden
        visit.context.close()


def test_no_text_is_smaller_than_16_pixels(visit):
    script = """[...document.querySelectorAll("body *")].filter((e) => e.getClientRects().length
        && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())
        && parseFloat(getComputedStyle(e).fontSize) < 16).map((e) => e.outerHTML)"""
    assert visit.page.evaluate(script) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_axe_finds_nothing_serious(browser, url, locale, scheme):
    if not AXE:
        pytest.skip("GPT2_TEST_AXE does not say where axe-core is")
    visit = Visit(browser, url, locale=locale, color_scheme=scheme, bypass_csp=True)
    visit.page.click("#head .act")
    visit.page.click("#going .act >> nth=0")
    visit.page.click("#head .numbers summary")
    visit.page.click("#start")
    visit.page.wait_for_selector("#compared table")
    visit.page.wait_for_selector("#cached canvas >> nth=2")
    visit.page.add_script_tag(path=AXE)
    found = visit.page.evaluate("axe.run().then((result) => result.violations)")
    serious = [
        (v["id"], [node["html"] for node in v["nodes"]][:5]) for v in found if v["impact"] in ("serious", "critical")
    ]
    visit.context.close()
    assert serious == []

"""explore.py: the command; the session's answers, each held against gpt2() and NumPy; the server, over real HTTP."""

import ast
import base64
import concurrent.futures
import copy
import http.client
import itertools
import json
import math
import re
import threading
import urllib.parse
import zlib

import numpy as np
import pytest
from conftest import REPO, assert_one_line_error, command, interrupt, running

import explore
import gpt2
import sampling
from explorer import session as sessions
from explorer import single_file, trace
from explorer.server import Server
from explorer.session import QuestionError, Session
from utils import load_encoder_hparams_and_params

TEXT = "My lord, the king is dead; my lord, the"
MODELS = REPO / "models"


@pytest.fixture(scope="module")
def model():
    return load_encoder_hparams_and_params("shakespeare", MODELS)


@pytest.fixture
def session(model):
    return Session("shakespeare", *model, TEXT)


@pytest.fixture
def ids(model):
    return model[0].encode(TEXT)


@pytest.fixture
def params(model):
    return model[2]


@pytest.fixture
def n_head(model):
    return model[1]["n_head"]


# the session


def values_of(call):
    """{(path, name, line): what is told of it}, of a call and all in it; the last of a name."""
    found = {((call["label"],), value["name"], value["line"]): value for value in call["values"]}
    for child in call["calls"]:
        found |= {((call["label"], *path), name, line): v for (path, name, line), v in values_of(child).items()}
    return found


def test_a_run_tells_the_shape_of_every_value_and_the_numbers_of_the_open_block(session, ids, params, n_head):
    told = values_of(session.answer("run", {"text": TEXT, "block": 1})["root"])
    run = trace.record(ids, **params, n_head=n_head)
    n_kept = 0
    for call in run.root.walk():
        for value in {(value.name, value.line): value for value in call.values}.values():
            answer = told[call.path, value.name, value.line]
            assert [n for _, n in answer["axes"]] == [*value.shape]
            if "key" in answer:
                np.testing.assert_array_equal(session.array(answer["key"]), value.array)
                n_kept += call.path[1:2] == ("block 1",)
            elif value.shape and value.name != "weights":
                assert call.path[1].startswith("block ")
                assert call.path[1] != "block 1"
    assert n_kept > 50


def test_axes_are_named_as_the_comments_of_gpt2_py_name_them(session):
    told = values_of(session.answer("run", {"text": TEXT})["root"])
    axes = {(path[-1], name, line): [axis for axis, _ in v["axes"]] for (path, name, line), v in told.items()}
    assert ["n_seq", "3", "n_head", "n_embd/n_head"] in axes.values()
    expected = dict.fromkeys(
        [("attention", "scores"), ("attention", "weights"), ("softmax", "return")], "n_head n_q n_k"
    )
    expected |= {("layer_norm ln_1", "return"): "n_seq n_embd", ("gelu", "return"): "n_seq 4*n_embd"}
    found = [(key, " ".join(names)) for (*key, _), names in axes.items() if tuple(key) in expected]
    assert {tuple(key) for key, _ in found} == expected.keys()
    assert all(names == expected[tuple(key)] for key, names in found)


def test_habits_are_shares_of_the_weights(session, ids, params, n_head):
    habits = session.answer("run", {"text": TEXT})["habits"]
    run = trace.record(ids, **params, n_head=n_head)
    weights = run["block 2", "attention", "weights"][3]
    before = np.mean([weights[i, i - 1] for i in range(1, len(ids))])
    pairs = [(i, [j for j in range(i) if ids[j] == ids[i]]) for i in range(len(ids))]
    copies = np.mean([weights[i, js].sum() for i, js in pairs if js])
    after = np.mean([weights[i, [j + 1 for j in js]].sum() for i, js in pairs if js])
    for name, share in {"before": before, "copy": copies, "after": after}.items():
        assert habits[2][name][3] == pytest.approx(share, abs=1e-4)


def test_the_merges_of_each_word_end_in_its_tokens(session, model):
    encoder, text = model[0], "remembrance, unhappy 你好"
    told = session.answer("run", {"text": text})
    ends = [word["steps"][-1]["symbols"] for word in told["words"]]
    assert [encoder.encoder[symbol] for symbols in ends for symbol in symbols] == told["ids"]
    for word in told["words"]:
        for before, after in itertools.pairwise(word["steps"]):
            i, symbols = after["joined"], before["symbols"]
            assert after["symbols"] == [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
            assert encoder.bpe_ranks[symbols[i], symbols[i + 1]] == after["rank"]


def test_the_lens_is_the_model_without_its_later_blocks(session, ids, params, n_head):
    session.answer("run", {"text": TEXT})
    rows = session.answer("lens", {"ids": ids, "positions": [4, 11]})["rows"]
    final = gpt2.gpt2(ids, **params, n_head=n_head).argmax(axis=-1)
    assert len(rows) == len(params["blocks"]) + 1
    for i, row in enumerate(rows):
        p = gpt2.softmax(gpt2.gpt2(ids, **{**params, "blocks": params["blocks"][:i]}, n_head=n_head))
        for position, view in zip([4, 11], row, strict=True):
            assert view["id"] == p[position].argmax()
            assert view["p"] == pytest.approx(p[position].max(), abs=1e-4)
            assert view["final_p"] == pytest.approx(p[position][final[position]], abs=1e-4)
            assert view["final_rank"] == 1 + (p[position] > p[position][final[position]]).sum()


def lead_without(x, added, ln_f, rows):
    """The lead of one row of wte over another, where the last x lacks what a part added, and ln_f divides as before."""
    deviation = np.sqrt(x.var() + 1e-5)
    z = (x - added - (x - added).mean()) / deviation * ln_f["g"] + ln_f["b"]
    return z @ rows[0] - z @ rows[1]


@pytest.mark.parametrize("other", [None, 5])
def test_why_is_what_the_lead_of_a_token_loses_without_what_a_part_added(session, ids, params, n_head, other):
    session.answer("run", {"text": TEXT})
    told = session.answer("why", {"ids": ids, "token": 77, "other": other})
    run = trace.record(ids, **params, n_head=n_head)
    x = run["block 3", "return"][-1].astype(np.float64)
    wte = params["wte"].astype(np.float64)
    rows = wte[77], wte.mean(axis=0) if other is None else wte[other]
    lead = lead_without(x, 0, params["ln_f"], rows)
    for i, block in enumerate(params["blocks"]):
        found = run[f"block {i}", "causal_attention", "return"][:, -1]
        for head, part in enumerate(found):
            added = part @ block["attn"]["c_proj"]["w"][32 * head : 32 * head + 32]
            expected = lead - lead_without(x, added, params["ln_f"], rows)
            assert told["heads"][i][head] == pytest.approx(expected, abs=1e-4)
        expected = lead - lead_without(x, run[f"block {i}", "ffn", "return"][-1], params["ln_f"], rows)
        assert told["mlps"][i] == pytest.approx(expected, abs=1e-4)
    for added, amount in zip((wte[ids[-1]], params["wpe"][len(ids) - 1]), told["embeddings"], strict=True):
        assert amount == pytest.approx(lead - lead_without(x, added, params["ln_f"], rows), abs=1e-4)


@pytest.mark.parametrize("text", [TEXT, "ROMEO:", "my lord " * 100])  # the longest attends in several parts
def test_the_parts_of_why_sum_to_the_lead_of_the_logit(session, model, params, n_head, text):
    ids = session.answer("run", {"text": text})["ids"]
    logits = gpt2.gpt2(ids, **params, n_head=n_head)[-1]
    best, second = np.argsort(-logits)[:2].tolist()
    for other, rest in ((None, logits.mean()), (second, logits[second])):
        told = session.answer("why", {"ids": ids, "other": other})
        parts = [*np.ravel(told["heads"]), *told["mlps"], *told["embeddings"], told["biases"]]
        assert told["token"] == best
        assert told["lead"] == pytest.approx(sum(parts), abs=1e-6)
        assert told["lead"] == pytest.approx(logits[best] - rest, abs=1e-3)
        assert sum(told["tokens"]) == pytest.approx(np.sum(told["heads"]), abs=1e-6)


def test_why_tells_from_which_token_a_head_brought_what_it_gave(session, ids, params, n_head):
    session.answer("run", {"text": TEXT})
    told = session.answer("why", {"ids": ids, "token": 77})
    run = trace.record(ids, **params, n_head=n_head)
    x, ahead = run["block 3", "return"][-1].astype(np.float64), params["wte"][77] - params["wte"].mean(axis=0)
    brought = np.zeros((4, n_head, len(ids)))
    for i, block in enumerate(params["blocks"]):
        weights, v = run[f"block {i}", "attention", "weights"], run[f"block {i}", "mha", "v"]
        for head in range(n_head):
            for j in range(len(ids)):
                added = weights[head, -1, j] * v[head, j] @ block["attn"]["c_proj"]["w"][32 * head : 32 * head + 32]
                brought[i, head, j] = (added - added.mean()) * params["ln_f"]["g"] @ ahead / np.sqrt(x.var() + 1e-5)
    np.testing.assert_allclose(told["tokens"], brought.sum(axis=(0, 1)), atol=1e-4)
    assert told["from"] == np.abs(brought).argmax(axis=-1).tolist()


def test_why_of_a_run_without_a_head_has_nothing_of_that_head(session, ids):
    session.answer("run", {"text": TEXT, "off": [{"block": 1, "head": 2}]})
    assert session.answer("why", {"ids": ids})["heads"][1][2] == 0


@pytest.mark.parametrize(("kind", "question"), [("why", {}), ("lens", {"positions": [0]})])
def test_what_is_asked_of_a_run_that_another_replaced_is_refused(session, ids, kind, question):
    session.answer("run", {"text": TEXT})
    session.answer("run", {"text": "ROMEO:"})
    with pytest.raises(QuestionError, match="another text has run since"):
        session.answer(kind, {"ids": ids, **question})


def zeroed(params, n_head, block, head=None, neuron=None):
    """The weights without a part, by a way of their own: a deep copy, and rows set to 0."""
    blocks = copy.deepcopy(params["blocks"])
    n = len(params["wte"][0]) // n_head
    if head is not None:
        blocks[block]["attn"]["c_proj"]["w"][head * n : head * n + n] = 0
    else:
        blocks[block]["mlp"]["c_proj"]["w"][neuron] = 0
    return {**params, "blocks": blocks}


@pytest.mark.parametrize(
    "ran_before", [{"text": "ROMEO:"}, {"text": TEXT}, {"text": TEXT, "off": [{"block": 0, "head": 0}]}]
)
@pytest.mark.parametrize("part", [{"block": 1, "head": 2}, {"block": 3, "neuron": 17}])
def test_a_part_switched_off_gives_the_logits_of_gpt2_with_those_weights(
    session, ids, params, n_head, part, ran_before
):
    session.answer("run", ran_before)
    answer = session.answer("compare", {"ids": ids, "off": [part]})
    before, after = session.array(answer["before"]), session.array(answer["after"])
    np.testing.assert_array_equal(before, gpt2.gpt2(ids, **params, n_head=n_head)[-1])
    np.testing.assert_array_equal(after, gpt2.gpt2(ids, **zeroed(params, n_head, **part), n_head=n_head)[-1])
    assert not np.array_equal(before, after)


def test_a_patch_puts_one_row_of_another_texts_stream_into_this_one(session, model, ids, params, n_head):
    patch = {"text": "Good night, my", "block": 2, "position": 11, "from": 3}
    answer = session.answer("compare", {"ids": ids, "patch": patch})
    streams = [params["wte"][some] + params["wpe"][: len(some)] for some in (ids, model[0].encode(patch["text"]))]
    for block in params["blocks"][:2]:
        streams = [gpt2.transformer_block(x, **block, n_head=n_head) for x in streams]
    x, other = streams
    x[11] = other[3]
    for block in params["blocks"][2:]:
        x = gpt2.transformer_block(x, **block, n_head=n_head)
    expected = gpt2.layer_norm(x, **params["ln_f"]) @ params["wte"].T
    np.testing.assert_allclose(session.array(answer["after"]), expected[-1], atol=1e-4)


def test_a_patch_comes_from_the_last_token_where_none_is_named(session, model, ids):
    text = "Good night, my"
    last = len(model[0].encode(text)) - 1
    logits = []
    for place in (None, last):
        patch = {"text": text, "block": 2, "position": 11, "from": place}
        logits.append(session.array(session.answer("compare", {"ids": ids, "patch": patch})["after"]))
    np.testing.assert_array_equal(*logits)


def test_in_a_terminal_a_token_that_is_a_part_of_a_character_is_its_bytes(model, capsys):
    explore.print_text(Session("shakespeare", *model, "你"))
    _, tokens, *_ = capsys.readouterr().out.splitlines()
    assert tokens.split()[::2] == ["‹E4›", "‹BD›", "‹A0›"]


@pytest.mark.parametrize("row", [0, 5, 11])
def test_a_patch_of_the_same_row_changes_nothing(row, session, ids):
    patch = {"text": TEXT, "block": 3, "position": row, "from": row}
    answer = session.answer("compare", {"ids": ids, "patch": patch})
    np.testing.assert_allclose(session.array(answer["after"]), session.array(answer["before"]), atol=1e-4)


def test_steps_give_the_ids_of_generate_and_run_the_newest_token_alone(session, ids, params, n_head):
    text, n_run = [*ids], []
    for _ in range(20):
        answer = session.answer("step", {"ids": text})
        n_run.append(answer["n_run"])
        text.append(answer["next_id"])
    assert text[len(ids) :] == gpt2.generate(ids, params, n_head, 20)
    assert n_run == [len(ids)] + [1] * 19


def test_a_step_shows_the_keys_of_all_tokens_and_the_query_of_the_newest(session, ids, params, n_head):
    for n in (len(ids) - 1, len(ids)):
        answer = session.answer("step", {"ids": ids[:n], "block": 2})
    run = trace.record(ids, **params, n_head=n_head)
    mha = run.call("block 2", "mha")
    for name in "kv":
        np.testing.assert_allclose(session.array(answer[name]["key"]), mha.last(name), atol=1e-4)
    np.testing.assert_allclose(session.array(answer["q"]["key"]), mha.last("q")[:, -1:], atol=1e-4)


def test_a_step_draws_as_sampling_draws(session, ids, params, n_head):
    logits = gpt2.gpt2(ids, **params, n_head=n_head)[-1]
    for point in np.linspace(0, 1, 20).tolist():
        answer = session.answer("step", {"ids": ids, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "point": point})
        assert answer["next_id"] == sampling.draw(logits, [point], 0.8, 40, 0.9)


def test_another_text_begins_with_an_empty_cache(session, ids, params, n_head):
    session.answer("step", {"ids": ids})
    other = [*ids[:5], 7, 8]
    answer = session.answer("step", {"ids": other})
    assert (answer["n_past"], answer["next_id"]) == (0, *gpt2.generate(other, params, n_head, 1))


def test_a_long_prompt_is_cut_and_that_is_said(session, model):
    text = "my lord " * 200
    answer = session.answer("run", {"text": text})
    ids = model[0].encode(text)
    assert answer["ids"] == ids[:128]
    assert answer["n_cut"] == len(ids) - 128


def test_no_text_is_the_token_that_begins_one(session, model):
    assert session.answer("run", {"text": ""})["ids"] == [model[0].encoder["<|endoftext|>"]]


BAD = [
    ("nonsense", {}),
    ("run", {}),
    ("run", {"text": 7}),
    ("run", {"text": "\ud800"}),
    ("run", {"text": "a", "surprise": 1}),
    ("run", {"text": "a", "block": 4}),
    ("run", {"text": "a", "block": 0.5}),
    ("run", {"text": "a", "off": "all"}),
    ("run", {"text": "a", "off": [{"block": 0}]}),
    ("run", {"text": "a", "off": [{"block": 0, "head": 5}]}),
    ("run", {"text": "a", "off": [{"block": 0, "head": [0]}]}),
    ("run", {"ids": []}),
    ("run", {"ids": [1024]}),
    ("run", {"ids": [-1]}),
    ("run", {"ids": [True]}),
    ("run", {"ids": [0] * 129}),
    ("run", {"ids": {"a": 1}}),
    ("lens", {"positions": [12]}),
    ("lens", {"positions": [*range(100)]}),
    ("lens", {"positions": []}),
    ("lens", {"ids": [0], "positions": [0]}),
    ("why", {"token": 1024}),
    ("why", {"token": 0, "other": -1}),
    ("why", {"token": "a"}),
    ("why", {"ids": "all"}),
    ("step", {"ids": [0] * 257}),
    ("step", {"ids": [0], "temperature": -1}),
    ("step", {"ids": [0], "temperature": 1, "top_p": 0}),
    ("step", {"ids": [0], "temperature": 1, "top_k": 0.5}),
    ("step", {"ids": [0], "temperature": 1, "point": 2}),
    ("step", {"ids": [0], "temperature": "hot"}),
    ("compare", {"ids": [0], "patch": {"text": "a"}}),
    ("compare", {"ids": [0], "patch": {"text": "a", "block": 0, "position": 1, "from": 0}}),
    ("compare", {"ids": [0], "patch": 7}),
    ("array", {"key": -1}),
    ("array", {"key": []}),
    ("array", {}),
]


@pytest.mark.parametrize(("kind", "question"), [bad for bad in BAD if bad[0] != "array"])
def test_a_bad_question_is_answered_with_one_line(session, kind, question):
    run = session.answer("run", {"text": TEXT})
    if kind in ("lens", "why"):
        question = {"ids": run["ids"], **question}
    with pytest.raises(QuestionError) as caught:
        session.answer(kind, question)
    assert re.fullmatch(r"[^\n]{5,300}", str(caught.value))


def test_the_page_knows_in_chinese_all_that_is_refused():
    words = (single_file.PAGE / "words.js").read_text("utf-8")
    known = words[words.index("const FAULTS = {") :].partition("\n};")[0]
    known = {a or b for a, b in re.findall(r"""^  (?:"(.*)"|'(.*)'): ["'].*[\u4e00-\u9fff]""", known, re.MULTILINE)}
    said = set()
    for path in (REPO / "explorer").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(node, "func", None) and (getattr(node.func, "id", "") or getattr(node.func, "attr", ""))
            if name in ("QuestionError", "refuse"):
                said |= {arg.value for arg in node.args if isinstance(getattr(arg, "value", None), str)}
    assert len(said) > 20
    assert known == said


# the server


@pytest.fixture
def served(session):
    with Server(session) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method="POST", path="/api/run", body=b'{"text": "My lord"}', **headers):
    """(status, headers, body) of a request as the page makes it, but for some headers; None leaves one out."""
    host = f"127.0.0.1:{server.server_port}"
    given = {"Host": host, "Origin": f"http://{host}", "X-Secret": server.secret, "Content-Length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body if method == "POST" else None)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, response.headers, data


def test_the_page_and_its_answers_are_served_at_this_machine_alone(served):
    assert served.server_address[0] == "127.0.0.1"
    status, headers, page = ask(served, "GET", "/")
    assert status == 200
    assert b"<main>" in page
    assert "'unsafe" not in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers
    assert json.loads(ask(served)[2])["ids"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": None},
        {"Origin": "http://evil.example"},
        {"Origin": None},
        {"Origin": "null"},
        {"X_Secret": None},
        {"X_Secret": "guess"},
        {"X_Secret": "é"},
    ],
)
def test_who_is_not_this_page_gets_403(served, headers):
    status, _, body = ask(served, **headers)
    assert status == 403
    assert b"ids" not in body


def test_a_foreign_name_for_this_machine_gets_no_page_either(served):
    assert ask(served, "GET", "/", Host="evil.example")[0] == 403


@pytest.mark.parametrize("path", ["/../gpt2.py", "/session.py", "/page/", "//etc/passwd", "/%2e%2e/gpt2.py", "/x.js"])
def test_nothing_but_the_files_of_the_page_is_served(served, path):
    assert ask(served, "GET", path)[0] == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"no json", 400),
        (b"\xff\xfe", 400),
        (b"[" * 60_000, 400),
        (b"[1]", 400),
        (b'{"text": NaN}', 400),
        (b'{"text": "\\ud800"}', 400),
        (b'"' + b"a" * 70_000 + b'"', 413),
    ],
)
def test_a_body_that_is_no_question_is_refused(served, capfd, body, status):
    assert ask(served, body=body)[0] == status
    assert ask(served)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("kind", "question"), BAD)
def test_a_bad_question_leaves_the_server_at_work_and_says_nothing_on_the_terminal(served, capfd, kind, question):
    status, _, body = ask(served, path=f"/api/{kind}", body=json.dumps(question).encode())
    assert status == 400
    assert json.loads(body)["error"]
    assert ask(served)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("length", ["-1", "1e3", "²", "99999999999", None])
def test_a_length_that_is_none_is_refused(served, length):
    assert ask(served, Content_Length=length)[0] in (411, 413)


def test_one_run_at_a_time(served, monkeypatch):
    running_now, most = [], []

    def record(*args, **kwargs):
        running_now.append(1)
        most.append(len(running_now))
        try:
            return recorded(*args, **kwargs)
        finally:
            running_now.pop()

    recorded = trace.record
    monkeypatch.setattr(sessions.trace, "record", record)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        statuses = [answer[0] for answer in pool.map(lambda _: ask(served), range(8))]
    assert statuses == [200] * 8
    assert max(most) == 1


def test_an_array_travels_as_little_endian_float32(served, params, n_head, model):
    answer = json.loads(ask(served)[2])
    body = ask(served, path="/api/array", body=json.dumps({"key": answer["logits"]}).encode())[2]
    logits = gpt2.gpt2(model[0].encode("My lord"), **params, n_head=n_head)[-1]
    np.testing.assert_array_equal(np.frombuffer(body, "<f4"), logits)


# the page as a file, and in a notebook


def test_the_modules_of_the_page_are_all_in_the_file_and_no_two_use_a_name():
    assert {*single_file.MODULES} == {path.stem for path in single_file.PAGE.glob("*.js")}
    names = re.findall(r"^(?:async )?(?:function|const|let) (\w+)", single_file.joined(), re.MULTILINE)
    assert len(names) == len({*names})
    assert not re.search(r"^(import|export)\b", single_file.joined(), re.MULTILINE)


def inside_of(page):
    return json.loads(re.search(r'id="inside">(.*?)</script>', page, re.DOTALL)[1])


def unpacked(inside, key):
    text = inside["packed"][inside["arrays"][str(key)]]
    return np.frombuffer(zlib.decompress(base64.b64decode(text[1:])), f"<f{text[0]}")


def test_the_file_has_the_numbers_of_all_blocks_of_a_small_model_and_no_weights(session, ids, params, n_head):
    inside = inside_of(single_file.page(session))
    run = trace.record(ids, **params, n_head=n_head)
    told = values_of(inside["run"]["root"])
    for block in range(len(params["blocks"])):
        path = ("gpt2", f"block {block}", "mha", "causal_attention", "attention")
        (value,) = (v for (p, name, _), v in told.items() if p == path and name == "weights")
        weights = run[f"block {block}", "attention", "weights"].ravel()
        np.testing.assert_allclose(unpacked(inside, value["key"]), weights, rtol=1e-3, atol=1e-7)
    assert not any("key" in value for value in told.values() if value.get("weight"))


@pytest.mark.parametrize("numbers", [[0.1, -3e4, 1e-9, -math.inf], [7e4, 0.1], [math.nan, math.inf, 1]])
def test_numbers_are_packed_to_three_digits_and_none_becomes_infinite(numbers):
    array = np.array(numbers, np.float32)
    again = unpacked({"packed": [single_file.pack(array)], "arrays": {"0": 0}}, 0)
    np.testing.assert_allclose(again, array, rtol=1e-3, atol=1e-7)


def test_the_file_has_logits_far_from_0_whole_so_that_their_probabilities_are_right(model):
    encoder, hparams, params = model
    shift = np.linalg.lstsq(params["wte"], np.full(len(params["wte"]), -100, np.float32), rcond=None)[0]
    params = {**params, "ln_f": {**params["ln_f"], "b": params["ln_f"]["b"] + shift}}
    inside = inside_of(single_file.page(Session("shakespeare", encoder, hparams, params, TEXT)))
    logits = gpt2.gpt2(encoder.encode(TEXT), **params, n_head=hparams["n_head"])[-1]
    assert np.median(logits) < -64  # where the step of half precision is 0.0625
    np.testing.assert_allclose(unpacked(inside, inside["run"]["logits"]), logits, rtol=1e-6)


def test_a_file_has_room_for_the_open_block_first_and_never_names_what_it_has_not(model, monkeypatch):
    whole = inside_of(single_file.page(Session("shakespeare", *model, TEXT, block=1)))
    monkeypatch.setattr(single_file, "N_BYTES", 600_000)
    inside = inside_of(single_file.page(Session("shakespeare", *model, TEXT, block=1)))
    assert sum(map(len, inside["packed"])) <= 600_000 < sum(map(len, whole["packed"]))
    keys = {*single_file.keys_in(inside)}
    assert keys == {*map(int, inside["arrays"])}
    assert {*inside["arrays"].values()} == {*range(len(inside["packed"]))}
    blocks = inside["run"]["root"]["calls"][:4]
    assert [any("key" in v for v in block["values"]) for block in blocks] == [True, True, False, False]


def test_what_was_typed_cannot_end_the_files_script(model):
    page = single_file.page(Session("shakespeare", *model, "</script><script>alert(1)</script><!--"))
    assert page.count("</script>") == 2


def test_show_is_the_page_in_a_frame_of_its_own():
    shown = explore.show(TEXT, "shakespeare", MODELS)._repr_html_()
    assert shown.startswith('<iframe sandbox="allow-scripts"')
    assert "&lt;main&gt;" in shown
    assert "<main>" not in shown


# the command


def test_the_text_shows_tokens_and_the_probabilities_that_numpy_computes(ids, model, params, n_head):
    result = command(TEXT, "--model_size=shakespeare", "--text", script="explore.py", env={"PYTHONUTF8": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"My {ids[0]}  ·lord {ids[1]}" in result.stdout
    p = gpt2.softmax(gpt2.gpt2(ids, **params, n_head=n_head))[-1]
    for i in np.argsort(-p)[:10].tolist():
        assert f"{p[i]:6.1%}  {model[0].decode([i]).replace(' ', '·')}\n" in result.stdout
    assert "block 0, head 3" in result.stdout


def test_of_a_single_token_the_terminal_says_nothing_of_where_it_looks():
    result = command("a", "--model_size=shakespeare", "--text", script="explore.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert "what comes next:" in result.stdout
    assert "head" not in result.stdout


def test_a_dash_reads_standard_input():
    result = command("-", "--model_size=shakespeare", "--text", script="explore.py", input="ROMEO:\n")
    assert "R" in result.stdout.splitlines()[1]
    assert "king" not in result.stdout.splitlines()[1]


def test_the_command_serves_the_page_at_the_address_it_prints_until_ctrl_c():
    with running(TEXT, "--model_size=shakespeare", "--no_browser", script="explore.py") as process:
        url = urllib.parse.urlsplit(process.stdout.readline().decode().strip())
        assert (url.scheme, url.hostname, url.path) == ("http", "127.0.0.1", "/")
        assert len(url.fragment) > 30
        connection = http.client.HTTPConnection(url.netloc, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        interrupt(process)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


def test_out_writes_the_page_and_says_so(tmp_path):
    result = command(TEXT, "--model_size=shakespeare", "--out", tmp_path / "page.html", script="explore.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "page.html holds the page" in result.stderr
    assert "<main>" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--block=4"], "explore.py: --block must be a whole number from 0 to 3"),
        (["--model_size=none"], "no model 'none'"),
        (["--out", "no/such/folder/page.html"], "cannot be written"),
        (["--out", "page.html", "--text"], "do not go together"),
        (["--blok=1"], "did you mean --block?"),
    ],
)
def test_a_mistake_is_one_line(args, message):
    model = [] if any("model_size" in arg for arg in args) else ["--model_size=shakespeare"]
    assert_one_line_error(command(TEXT, *args, *model, "--no_browser", script="explore.py"), message)


def test_a_page_that_could_not_be_written_is_an_error_before_anything_is_loaded(models_dir):
    done = command("--out=/nowhere/a.html", model=models_dir / "nonsense", script="explore.py")
    assert_one_line_error(done, "/nowhere/a.html cannot be written: no such folder")

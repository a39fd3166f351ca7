"""`llmattrib serve`: the hits of Run.query, escaped text, limits, who may ask, one query at a time, a real process."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tiny import tiny_rows, tiny_run
from typer.testing import CliRunner

from llmattrib.build import build_features
from llmattrib.cli import app as command_line
from llmattrib.config import RunConfig, config_to_yaml
from llmattrib.errors import ConfigError
from llmattrib.index import build_index
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.web import MAX_BODY, bind, check_access, make_app

PROMPT, COMPLETION = "what is the colour of a stone house?", "green blue"
EVIL = "<script>alert('x')</script> & \"quotes\""
TOKEN = "0123456789abcdef"
LOCAL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run, one of whose examples would like to run a script."""
    folder = tmp_path_factory.mktemp("web")
    made = tiny_run(folder, num_rows=8, reduce={"methods": ["grad_cos", "grad_dot"]}, query={"method": "grad_cos"})
    rows = [row | ({"prompt": EVIL, "id": "<b>evil</b>"} if k == 3 else {}) for k, row in enumerate(tiny_rows(8))]
    Path(made.data.train).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build_features(made)
    reduce_run(made)
    for method in made.reduce.methods:
        build_index(made, method)
    return made


@pytest.fixture(scope="module")
def run(config: RunConfig) -> Run:
    opened = Run(config)
    opened.load()
    return opened


@pytest.fixture
def client(run: Run) -> Iterator[TestClient]:
    with TestClient(make_app(run), base_url=LOCAL) as made:
        yield made


def test_answers_are_those_of_a_query(client: TestClient, run: Run) -> None:
    answer = client.post("/query", json={"prompt": PROMPT, "completion": COMPLETION, "method": "grad_dot", "top": 3})
    assert answer.status_code == 200
    assert answer.json() == json.loads(run.query(PROMPT, COMPLETION, method="grad_dot", top=3).to_json())
    turns = [{"role": "user", "content": PROMPT}]
    assert client.post("/query", json={"prompt": turns, "completion": COMPLETION}).json() == json.loads(
        run.query(PROMPT, COMPLETION).to_json()
    )


def test_the_page_says_where_the_answer_is_from(client: TestClient, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "<h2>Answer, given</h2>" in client.post("/", data={"prompt": PROMPT, "completion": COMPLETION}).text
    for tokens, source in (([5, 6], "generated"), ([5] * 48, "generated, cut off")):
        monkeypatch.setattr(run.extractor.loaded, "generate", lambda *_, tokens=tokens: [tokens])
        assert f"<h2>Answer, {source}</h2>" in client.post("/", data={"prompt": PROMPT}).text


def test_the_page_shows_hits_and_escapes_every_text(client: TestClient, run: Run) -> None:
    assert "<form" in client.get("/").text
    form = {"prompt": EVIL, "completion": "</textarea><i>", "method": "grad_cos", "top": "8"}
    answer = client.post("/", data=form)
    assert answer.status_code == 200
    hits = run.query(EVIL, form["completion"], top=8)
    assert "<b>evil</b>" in [hit.id for hit in (*hits.helpful, *hits.harmful)]
    for hit in (*hits.helpful, *hits.harmful):
        assert f"<td>{hit.value:+.4g}</td>" in answer.text
    for raw in ("<script", "<b>", "<i>", "</textarea><"):
        assert raw not in answer.text.replace("</textarea></label>", "")
    assert answer.text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quotes&quot;") == 2
    assert "&lt;b&gt;evil&lt;/b&gt;" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("body", "status", "found"),
    [
        ({"prompt": PROMPT, "method": "trak"}, 400, "method 'trak' is not one of this run's"),
        ({"prompt": PROMPT * 50, "completion": "green"}, 400, "tokens, prompt and completion together"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": PROMPT, "top": 1001}, 400, "top: Input should be less than or equal to 1000"),
        ({"prompt": PROMPT, "extra": 1}, 400, "extra: Extra inputs are not permitted"),
        ({}, 400, "prompt: Field required"),
    ],
)
def test_errors_are_json_that_says_what_to_do(
    client: TestClient, body: dict[str, Any], status: int, found: str
) -> None:
    answer = client.post("/query", json=body)
    assert answer.status_code == status
    assert found in answer.json()["error"]["found"]
    assert answer.json()["error"].keys() >= {"kind", "fix"}


@pytest.mark.parametrize(
    ("sent", "status", "found"),
    [
        ({"prompt": " "}, 400, "the prompt is empty"),
        ({"prompt": PROMPT, "top": "many"}, 400, "&#x27;many&#x27; examples"),
        ({"prompt": PROMPT, "method": "<u>"}, 400, "method &#x27;&lt;u&gt;&#x27; is not one"),
    ],
)
def test_errors_of_the_form_are_on_the_page(client: TestClient, sent: dict[str, str], status: int, found: str) -> None:
    answer = client.post("/", data=sent)
    assert answer.status_code == status
    assert found in answer.text


def test_damage_of_the_run_is_no_fault_of_the_query(client: TestClient, config: RunConfig, run: Run) -> None:
    record = Path(config.layout.index_manifest("grad_dot"))
    kept, opened = record.read_text(), run._attributions.pop("grad_dot", None)
    try:
        record.unlink()
        answer = client.post("/query", json={"prompt": PROMPT, "completion": COMPLETION, "method": "grad_dot"})
        assert (answer.status_code, answer.json()["error"]["kind"]) == (500, "StoreNotFoundError")
        assert "llmattrib index" in answer.json()["error"]["fix"]
    finally:
        record.write_text(kept)
        if opened:
            run._attributions["grad_dot"] = opened


def test_large_requests_are_refused(client: TestClient) -> None:
    large = b'{"prompt": "' + b"a" * MAX_BODY + b'"}'
    headers = {"content-type": "application/json"}
    assert client.post("/query", content=large, headers=headers).status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(2 * MAX_BODY // 1024):
            yield b"a" * 1024

    answer = client.post("/query", content=chunks(), headers=headers)  # without a length
    assert answer.status_code == 413
    assert answer.json()["error"]["found"] == "the request is larger than 65,536 bytes"
    assert client.post("/", data={"prompt": "a" * MAX_BODY}).status_code == 413
    assert client.post("/query", content=b"{", headers=headers).status_code == 400
    assert client.post("/query", content=b"{}").status_code == 415
    bad = client.post("/", content=b"prompt=%ff", headers={"content-type": "application/x-www-form-urlencoded"})
    assert (bad.status_code, "not UTF-8" in bad.text) == (400, True)


def test_other_sites_and_names_are_refused(client: TestClient) -> None:
    body = {"prompt": PROMPT, "completion": COMPLETION}
    assert client.post("/query", json=body, headers={"origin": "https://evil.example"}).status_code == 403
    assert client.post("/", data=body, headers={"origin": "null"}).status_code == 403
    assert client.post("/query", json=body, headers={"host": "evil.example"}).status_code == 403, "DNS rebinding"
    assert client.get("/", headers={"host": "evil.example:8000"}).status_code == 403
    for host in ("localhost:8000", "[::1]:8000"):
        assert client.get("/", headers={"host": host}).status_code == 200
    assert client.post("/query", json=body, headers={"origin": LOCAL}).status_code == 200
    for name, wrong in (("host", "[::1"), ("host", "127.0.0.1]"), ("origin", "http://[::1")):
        answer = client.post("/query", json=body, headers={name: wrong})
        assert (answer.status_code, "is not understood" in answer.json()["error"]["found"]) == (400, True)
        assert client.post("/", data=body, headers={name: wrong}).status_code == 400


def test_a_token_is_needed_where_one_is_set(run: Run) -> None:
    body = {"prompt": PROMPT, "completion": COMPLETION}
    with TestClient(make_app(run, TOKEN), base_url="https://far.example") as client:
        for given in (None, "", "Bearer wrong", f"Bearer {TOKEN}x", "Bearer \u00e9".encode()):
            headers = {} if given is None else {"authorization": given}
            answer = client.post("/query", json=body, headers=headers)  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["error"]["found"]) == (401, "the token is missing or wrong")
        assert client.post("/query", json=body, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert 'name="token"' in client.get("/").text
        assert client.post("/", data=body).status_code == 401
        shown = client.post("/", data=body | {"token": TOKEN})
        assert shown.status_code == 200
        assert TOKEN not in shown.text


def test_listening_for_others_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "far.example"):
        with pytest.raises(ConfigError, match=r"without a token\n  expected: 127\.0\.0\.1, or a token"):
            check_access(host, None)
        check_access(host, TOKEN)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_access(host, None)
    with pytest.raises(ConfigError, match="the token has 3 characters\n  expected: 16 or more"):
        check_access("127.0.0.1", "abc")


def test_a_taken_port_is_named() -> None:
    refusal = pytest.raises(ConfigError, match=r"127.0.0.1 port \d+ cannot be listened on.*\n.*\n.*--port")
    with bind("127.0.0.1", 0) as taken, refusal:
        bind("127.0.0.1", taken.getsockname()[1])


def test_one_query_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, real = [0], [0], run.query

    def watched(*arguments: Any, **named: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        found = real(*arguments, **named)
        inside[0] -= 1
        return found

    monkeypatch.setattr(run, "query", watched)
    body, codes = {"prompt": PROMPT, "completion": COMPLETION}, []
    with TestClient(make_app(run), base_url=LOCAL) as client:
        threads = [
            threading.Thread(target=lambda: codes.append(client.post("/query", json=body).status_code))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (codes, most[0]) == ([200] * 4, 1)


def test_a_missing_server_package_names_the_extra() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; import llmattrib.web"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigError: uvicorn is not installed" in ended.stderr
    assert "extra `serve`" in ended.stderr


def test_the_command_refuses_before_it_loads_anything(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    ended = CliRunner().invoke(command_line, ["serve", str(path), "--host", "0.0.0.0"])
    assert ended.exit_code == 2
    assert "LLMATTRIB_TOKEN" in ended.stderr


def test_a_real_server_answers_and_stops(config: RunConfig, run: Run) -> None:
    command = [sys.executable, "-m", "llmattrib.cli", "serve", config.run_dir, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line + (server.stderr.read() if server.stderr and server.poll() is not None else "")
        data = json.dumps({"prompt": PROMPT, "completion": COMPLETION}).encode()
        request = urllib.request.Request(found[0] + "query", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            hits = json.load(answer)
        expected = json.loads(run.query(PROMPT, COMPLETION).to_json())
        assert [hit["id"] for hit in hits["helpful"]] == [hit["id"] for hit in expected["helpful"]]
        assert hits["helpful"][0]["value"] == pytest.approx(expected["helpful"][0]["value"], rel=1e-4)
    finally:
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=300)
    assert (server.returncode, err) == (0, "")

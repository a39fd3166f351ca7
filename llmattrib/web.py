"""`llmattrib serve`: queries over HTTP by a model that stays loaded.

    POST /query   {"prompt": ..., "completion": ..., "method": ..., "top": ...} -> hits, as `query --json` prints them
    GET, POST /   a form, and the hits below it

One query is computed at a time; others wait. Errors raised on purpose are JSON with what was found, what was expected
and what to do: 400 where the query is at fault, 500 where the run is. A request body has at most 64 KiB.

The server listens on this machine alone unless a token is set, which each query must then bring (`Authorization:
Bearer TOKEN`, or the form's field). Without one, requests must name this machine as their host and not come from
another site's page, so that no web site reaches it through a browser. There is no TLS: off this machine put a proxy
with TLS before it.
"""

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmattrib.data import Message
from llmattrib.errors import ConfigError, DataError, LlmattribError, MethodError
from llmattrib.hits import Hits
from llmattrib.query import Run
from llmattrib.web_page import FIELDS, HEADERS, render

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse, JSONResponse
except ImportError as missing:
    raise ConfigError(
        f"{missing.name} is not installed",
        expected="what a server needs",
        fix="install llmattrib with the extra `serve`",
    ) from missing

MAX_BODY = 64 * 1024
MAX_TOP = 1000
MAX_WAITING = 64  # connections at a time; more get 503
MIN_TOKEN = 16


class Refused(Exception):
    """A request that is not answered: an HTTP status, and why."""

    def __init__(self, status: int, found: str, fix: str = "") -> None:
        super().__init__(found)
        self.status, self.error = status, LlmattribError(found, fix=fix)


class Turn(BaseModel):
    """One chat turn."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str


class Asked(BaseModel):
    """The body of POST /query."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[Turn], Field(min_length=1)]
    completion: Annotated[str, Field(min_length=1)] | None = None
    method: str | None = None
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] | None = None


def is_loopback(host: str) -> bool:
    """Say whether an address or name is this machine's own."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def check_access(host: str, token: str | None) -> None:
    """Refuse to listen where others reach the server without a token.

    Raises:
        ConfigError: there is none, or one that is quickly guessed.
    """
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"the server was to listen on {host}, where others reach it, without a token",
            expected="127.0.0.1, or a token",
            fix="set LLMATTRIB_TOKEN, for example to the output of `openssl rand -hex 32`",
        )
    if token is not None and len(token) < MIN_TOKEN:
        raise ConfigError(f"the token has {len(token)} characters", expected=f"{MIN_TOKEN} or more")


class _Gate:
    """Who may ask, and how much."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def check_origin(self, request: Request) -> None:
        """Without a token only this machine's own pages and programs may ask."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._token is None and not is_loopback(_parsed(f"//{host}").hostname or ""):
            raise Refused(403, f"the request is for host {host!r}", "open the address that the server printed")
        if origin is not None and _parsed(origin).netloc != host:
            raise Refused(403, f"the request comes from a page of {origin}")

    def check_token(self, given: str) -> None:
        """Compare in constant time."""
        if self._token is not None and not hmac.compare_digest(given.encode(), self._token.encode()):
            raise Refused(401, "the token is missing or wrong", "send the header `Authorization: Bearer TOKEN`")

    async def body(self, request: Request, kind: str) -> bytes:
        """Read no more than is allowed."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
            raise Refused(415, f"the content type is not {kind}", f"send the header `Content-Type: {kind}`")
        data = b""
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BODY:
                raise Refused(413, f"the request is larger than {MAX_BODY:,} bytes")
        return data


def make_app(run: Run, token: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        run: an opened run.
        token: what every query must bring; None when nobody else reaches the server.
    """
    app = FastAPI(title="llmattrib", docs_url=None, redoc_url=None, openapi_url=None)
    gate, one_at_a_time = _Gate(token), asyncio.Lock()
    default = run.config.query.method
    methods = [default, *(name for name in run.config.reduce.methods if name != default)]

    async def answer(asked: Asked) -> Hits:
        turns = asked.prompt
        prompt = turns if isinstance(turns, str) else [Message(role=t.role, content=t.content) for t in turns]
        async with one_at_a_time:
            return await run_in_threadpool(run.query, prompt, asked.completion, method=asked.method, top=asked.top)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse(_tree(error.error), error.status, HEADERS)

    @app.exception_handler(LlmattribError)
    async def failed(request: Request, error: LlmattribError) -> Response:
        return JSONResponse(_tree(error), _status(error), HEADERS)

    @app.post("/query")
    async def query(request: Request) -> Response:
        gate.check_origin(request)
        gate.check_token(request.headers.get("authorization", "").removeprefix("Bearer "))
        hits = await answer(_asked(await gate.body(request, "application/json")))
        return Response(hits.to_json(), 200, HEADERS, "application/json")

    @app.get("/")
    async def page(request: Request) -> Response:
        gate.check_origin(request)
        return HTMLResponse(render(methods, {}, token is not None), headers=HEADERS)

    @app.post("/")
    async def form(request: Request) -> Response:
        sent: Mapping[str, str] = {}
        try:
            gate.check_origin(request)
            sent = _fields(await gate.body(request, "application/x-www-form-urlencoded"))
            gate.check_token(sent.get("token", ""))
            hits = await answer(_of_form(sent))
        except (Refused, LlmattribError) as error:
            status, what = (error.status, error.error) if isinstance(error, Refused) else (_status(error), error)
            return HTMLResponse(render(methods, sent, token is not None, error=what), status, HEADERS)
        return HTMLResponse(render(methods, sent, token is not None, hits), headers=HEADERS)

    return app


def _parsed(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError as error:  # such as half a bracket
        raise Refused(400, f"the address {address!r} of a header is not understood ({error})") from error


def _tree(error: LlmattribError) -> dict[str, dict[str, str]]:
    parts = {"kind": type(error).__name__, "found": error.found, "expected": error.expected, "fix": error.fix}
    return {"error": {name: text for name, text in parts.items() if text}}


def _status(error: LlmattribError) -> int:
    return 400 if isinstance(error, DataError | MethodError) else 500


def _asked(data: bytes) -> Asked:
    try:
        return Asked.model_validate_json(data)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"])) or "the body"
        raise Refused(
            400,
            f"{place}: {wrong['msg']}",
            'send {"prompt": TEXT or [{"role": ..., "content": ...}]} and, if wanted, completion, method and top',
        ) from error


def _fields(data: bytes) -> dict[str, str]:
    try:
        pairs = parse_qsl(data.decode(), keep_blank_values=True, strict_parsing=False, errors="strict")
    except ValueError as error:
        raise Refused(400, "the form is not UTF-8") from error
    return {name: text.replace("\r\n", "\n") for name, text in pairs if name in FIELDS}


def _of_form(sent: Mapping[str, str]) -> Asked:
    top = sent.get("top", "").strip()
    if not sent.get("prompt", "").strip():
        raise Refused(400, "the prompt is empty")
    if top and not (top.isascii() and top.isdigit() and 1 <= int(top) <= MAX_TOP):
        raise Refused(400, f"{top!r} examples", f"ask for 1 to {MAX_TOP:,}")
    return Asked(
        prompt=sent["prompt"],
        completion=sent.get("completion") or None,
        method=sent.get("method") or None,
        top=int(top) if top else None,
    )


def bind(host: str, port: int) -> socket.socket:
    """Take an address before the model is loaded.

    Raises:
        ConfigError: it is taken, or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{host} port {port} cannot be listened on ({error})",
            expected="a free port of this machine",
            fix="set --port",
        ) from error


def serve(run: Run, place: socket.socket, token: str | None) -> None:
    """Answer requests until the process is stopped.

    Args:
        run: an opened run.
        place: where to listen, from `bind`.
        token: see `check_access`.
    """
    config = uvicorn.Config(
        make_app(run, token), log_level="warning", access_log=False, server_header=False, limit_concurrency=MAX_WAITING
    )
    uvicorn.Server(config).run(sockets=[place])

"""The one page of `llmattrib serve`: a form, and the hits of a query or an error below it. Plain HTML without scripts.

Every text is escaped here; nothing else writes HTML. Knows hits and errors, and nothing of the server.
"""

from collections.abc import Mapping, Sequence
from html import escape

from llmattrib.errors import LlmattribError
from llmattrib.hits import Hit, Hits

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Of every answer: no script runs, no other site frames the page or learns what was asked."""
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
textarea, input, select { font: inherit; width: 100%; box-sizing: border-box }
label { display: block; margin-top: .6rem } button { font: inherit; margin-top: 1rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top; padding: .3rem .6rem }
tr { border-top: 1px solid #ccc } td { white-space: pre-wrap; overflow-wrap: anywhere }
.error { border-left: .3rem solid #b00; padding-left: 1rem; white-space: pre-wrap }
"""
FIELDS = ("prompt", "completion", "method", "top", "token")


def render(
    methods: Sequence[str],
    form: Mapping[str, str],
    needs_token: bool,
    hits: Hits | None = None,
    error: LlmattribError | None = None,
) -> str:
    """Return the page.

    Args:
        methods: what can be chosen, the default first.
        form: what was sent, by field, to be shown again.
        needs_token: whether there is a field for the token. It is not sent back.
        hits: the answer, if there is one.
        error: what went wrong, if anything did.
    """
    below = "" if hits is None else _answer(hits)
    if error is not None:
        below = f'<p class="error">{escape(str(error))}</p>'
    chosen = form.get("method", "")
    options = "".join(f"<option{' selected' if name == chosen else ''}>{escape(name)}</option>" for name in methods)
    token = '<label>Token <input name="token" type="password" required></label>' if needs_token else ""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>llmattrib</title>"
        f"<style>{_STYLE}</style><h1>Which training examples made it say this?</h1>"
        '<form method="post" action="/" accept-charset="utf-8">'
        f'<label>Prompt <textarea name="prompt" rows="4" required>\n{escape(form.get("prompt", ""))}</textarea></label>'
        '<label>Answer (the model gives one when this is empty) <textarea name="completion" rows="2">\n'
        f"{escape(form.get('completion', ''))}</textarea></label>"
        f'<label>Method <select name="method">{options}</select></label>'
        f'<label>Examples of either kind <input name="top" type="number" min="1" '
        f'value="{escape(form.get("top", ""), quote=True)}"></label>{token}'
        f"<button>Trace</button></form>{below}</html>\n"
    )


def _answer(hits: Hits) -> str:
    return (
        f"<h2>Answer, {hits.origin}</h2><p>{escape(hits.completion)}</p>"
        f"<p>{escape(hits.method)}: all {hits.num_examples:,} examples together {hits.total:+.4g}</p>"
        f"<h2>Helpful</h2>{_table(hits.helpful)}<h2>Harmful</h2>{_table(hits.harmful)}"
    )


def _table(hits: Sequence[Hit]) -> str:
    if not hits:
        return "<p>None.</p>"
    rows = "".join(
        f"<tr><td>{hit.rank}</td><td>{hit.value:+.4g}</td><td>{hit.share:+.2%}</td><td>{escape(hit.id)}</td>"
        f"<td>{escape(hit.prompt)}</td><td>{escape(hit.completion)}</td></tr>"
        for hit in hits
    )
    head = "".join(f"<th>{name}</th>" for name in ("", "value", "share", "id", "prompt", "completion"))
    return f"<table><tr>{head}</tr>{rows}</table>"

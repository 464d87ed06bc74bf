"""The report as one HTML page that loads nothing.

Everything a policy or a data set wrote is untrusted: it is escaped, control and direction characters become visible,
and the page's content policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from steadyhelm.report.charts import Chart, Series, draw
from steadyhelm.report.records import Comparison, ReportData, Sample, Token
from steadyhelm.telemetry import metrics as names

STRONGEST = 3.0  # |advantage| of the full colour: the default filter's bound
DEEPEST = 65.0  # per cent of colour there, so that text on it stays readable
UNSURE = 0.5  # sampled with less than this probability: underlined
RECENT = 10  # iterations that a figure at the top is the mean of
LONG_TEXT = 1200  # characters from which on a text scrolls in its own box

IMAGE_TYPES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
)


def render_report(data: ReportData) -> str:
    """The page. Pure: the same records give the same text."""
    style, script = _resource("page.css"), _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = "".join(
        (_header(data), _tiles(data), _curves(data), _before_after(data), _trajectories(data), _configuration(data))
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(data.run)} · Steadyhelm</title><style>{style}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>"
    )


def text(value: object) -> str:
    """``value`` as text that is safe in HTML and in attributes, its invisible characters made visible."""
    return escape("".join(_visible(character) for character in str(value)), quote=True)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (code >= 0x20 and code not in _DIRECTIONS and code != 0x7F):
        return character if not 0xD800 <= code <= 0xDFFF else "\ufffd"
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\\u{code:04x}"


_DIRECTIONS = {0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that reorder what follows them: they could make a page show another text than it holds."""


def _resource(name: str) -> str:
    return resources.files("steadyhelm.report").joinpath(name).read_text(encoding="utf-8")


def _header(data: ReportData) -> str:
    config = data.config
    done = max((line.iteration for line in data.metrics), default=0)
    planned = config.get("schedule", {}).get("iterations", done)
    facts = [
        f"{config.get('algorithm', {}).get('type', '')}",
        f"{done} of {planned} iterations" + (", not finished" if done < planned else ""),
        f"seed {config.get('seed', 0)}",
        *([f"{data.attempts} attempts"] if data.attempts > 1 else []),
        *(f"{name} {version}" for name, version in sorted(data.versions.items())),
    ]
    return (
        f'<header><p class="eyebrow">Steadyhelm run report</p><h1>{text(data.run)}</h1>'
        f'<p class="facts">{" · ".join(text(fact) for fact in facts if fact)}</p></header>'
    )


def _tiles(data: ReportData) -> str:
    tiles = []
    if data.evaluations:
        first, last = data.evaluations[0], data.evaluations[-1]
        after = last.metrics.get(names.EVAL_ACCURACY, math.nan)
        gain = 100 * (after - first.metrics.get(names.EVAL_ACCURACY, math.nan))
        note = (
            f"{gain:+.1f} points since iteration {first.iteration}" if len(data.evaluations) > 1 else "one evaluation"
        )
        tiles.append(("Held-out accuracy", _percent(after), note))
        if names.EVAL_BOTH_ORDERS in last.metrics:
            both = _percent(last.metrics[names.EVAL_BOTH_ORDERS])
            tiles.append(("Right in both orders", both, f"of {last.metrics.get(names.EVAL_PAIRS, 0):.0f} pairs"))
    for name, label, form in (
        (names.REWARD_MEAN, "Mean reward", "{:.3f}"),
        (names.REWARD_FORMAT, "Format reward", "{:.3f}"),
        (names.REWARD_CONSISTENCY, "Consistency reward", "{:.3f}"),
        (names.LENGTH_MEAN, "Completion length", "{:.1f}"),
        (names.ITERATION_SECONDS, "Seconds per iteration", "{:.2f}"),
        (names.OVERHEAD_SHARE, "Overhead", "{:.1%}"),
    ):
        values = [line.metrics[name] for line in data.metrics if math.isfinite(line.metrics.get(name, math.nan))]
        if values:
            recent = values[-RECENT:]
            tiles.append((label, form.format(math.fsum(recent) / len(recent)), f"first {form.format(values[0])}"))
    cells = "".join(f"<li><span>{text(a)}</span><b>{text(b)}</b><em>{text(c)}</em></li>" for a, b, c in tiles)
    about = f"Accuracy is the last evaluation's; the other figures are means over the last {RECENT} iterations."
    return f'<ul class="tiles">{cells}</ul><p class="soft">{about}</p>' if cells else ""


def _curves(data: ReportData) -> str:
    figures = "".join(draw(chart) for chart in charts(data))
    if not figures:
        return "<h2>Curves</h2><p>No iteration has been logged.</p>"
    return (
        "<h2>Curves</h2><p>Over the iterations. Long curves show their moving mean, with the values themselves faint "
        f'behind it; bands are 95 % intervals.</p><div class="charts">{figures}</div>'
    )


def charts(data: ReportData) -> list[Chart]:
    """The page's charts; those without a value are not drawn."""
    parts = sorted({n for line in data.metrics for n in line.metrics if n.startswith("reward/")})
    shown = [n for n in parts if n not in (names.REWARD_STD, names.REWARD_VALID_RATE, names.REWARD_MEAN)]
    phases = {n for line in data.metrics for n in line.metrics if n.startswith("seconds/")} - {names.ITERATION_SECONDS}
    longest = sorted(phases, key=lambda n: -_total(data, n))[:6]

    on_policy = not any(line.metrics.get(names.STALENESS_MAX) for line in data.metrics)

    def chart(title: str, *metrics: str, subtitle: str = "", percent: bool = False, zero: bool = False) -> Chart:
        series = tuple(_series(data, name) for name in metrics)
        return Chart(title=title, series=series, subtitle=subtitle, percent=percent, zero=zero)

    return [
        _accuracy(data),
        chart("Reward", names.REWARD_MEAN, *shown),
        chart("Completion length", names.LENGTH_MEAN, names.LENGTH_MAX, subtitle="tokens", zero=True),
        chart("Filter and clips", names.FILTER_LOW, names.FILTER_HIGH, names.PRE_CLIP_HITS, names.CLIP_FRACTION,
              subtitle="share of tokens", percent=True, zero=True),
        chart("Entropy and divergence", names.ENTROPY, names.KL, names.POLICY_KL, subtitle="nats per token", zero=True),
        chart("Engine against trainer", names.LOGPROB_GAP_MEAN, names.LOGPROB_GAP_MAX,
              subtitle="|log-prob gap|, nats", zero=True),
        chart("Loss", names.LOSS),
        chart("Gradient norm", names.GRAD_NORM, zero=True),
        chart("Staleness", *(() if on_policy else (names.STALENESS_MEAN, names.STALENESS_MAX)),
              subtitle="versions between sampling and training", zero=True),
        Chart(title="Truncated, unscored and stale",
              series=(_series(data, names.TRUNCATED_RATE), _unscored(data), _stale(data)),
              subtitle="share of samples", percent=True, zero=True),
        chart("Seconds per phase", names.ITERATION_SECONDS, *longest, subtitle="of an iteration", zero=True),
        chart("Overhead", names.OVERHEAD_SHARE, subtitle="time in which nothing computes",
              percent=True, zero=True),
        chart("Tokens per second", names.ROLLOUT_TOKENS_PER_S, names.LEARNER_TOKENS_PER_S, zero=True),
    ]  # fmt: skip


def _series(data: ReportData, name: str) -> Series:
    points = tuple((float(line.iteration), line.metrics[name]) for line in data.metrics if name in line.metrics)
    group, _, rest = name.partition("/")
    shown = {names.REWARD_MEAN: "total", names.ITERATION_SECONDS: "whole iteration"}.get(name)
    if group in ("rollout", "learner") and name.endswith("_per_s"):
        shown = group
    return Series(name=shown or rest.replace("_", " ").replace(".", " · "), points=points)


def _unscored(data: ReportData) -> Series:
    valid = _series(data, names.REWARD_VALID_RATE).points
    return Series(name="unscored", points=tuple((iteration, 1.0 - share) for iteration, share in valid))


def _stale(data: ReportData) -> Series:
    """The share of samples that were dropped as stale; nothing where none ever was."""
    known = [line for line in data.metrics if {names.STALENESS_DROPPED, names.ROLLOUT_SAMPLES} <= line.metrics.keys()]
    shares = [line.metrics[names.STALENESS_DROPPED] / line.metrics[names.ROLLOUT_SAMPLES] for line in known]
    points = zip((float(line.iteration) for line in known), shares, strict=True)
    return Series(name="dropped as stale", points=tuple(points) if any(shares) else ())


def _total(data: ReportData, name: str) -> float:
    return math.fsum(v for line in data.metrics if math.isfinite(v := line.metrics.get(name, math.nan)))


def _accuracy(data: ReportData) -> Chart:
    def points(name: str) -> tuple[tuple[float, float], ...]:
        return tuple((float(e.iteration), e.metrics[name]) for e in data.evaluations if name in e.metrics)

    band = tuple(
        (float(e.iteration), e.metrics[names.EVAL_ACCURACY_LOW], e.metrics[names.EVAL_ACCURACY_HIGH])
        for e in data.evaluations
        if names.EVAL_ACCURACY_LOW in e.metrics and names.EVAL_ACCURACY_HIGH in e.metrics
    )
    series = [
        Series(name="accuracy, both orders averaged", points=points(names.EVAL_ACCURACY), band=band, markers=True),
        Series(name="right in both orders", points=points(names.EVAL_BOTH_ORDERS), markers=True),
        Series(name="chose the first", points=points(names.EVAL_FIRST_SLOT), markers=True),
    ]
    return Chart(title="Held-out accuracy", series=tuple(series), percent=True)


def _before_after(data: ReportData) -> str:
    if not data.comparisons:
        return ""
    first, last = data.comparisons[0].before.iteration, data.comparisons[0].after.iteration
    rows = "".join(
        f"<tr><th>{'right' if was else 'wrong'} before</th><td>{data.changes.get((was, True), 0)}</td>"
        f"<td>{data.changes.get((was, False), 0)}</td></tr>"
        for was in (False, True)
    )
    table = f"<table><tr><th></th><th>right after</th><th>wrong after</th></tr>{rows}</table>" if data.changes else ""
    cards = "".join(_comparison(item) for item in data.comparisons)
    return (
        f"<h2>Before and after</h2><p>The same held-out prompts, answered by the policy of iteration {first} and of "
        f"iteration {last}. The table counts them all; below it are some of each kind that occurs.</p>{table}{cards}"
    )


def _comparison(item: Comparison) -> str:
    answers = "".join(
        f'<div class="answer"><h4>After iteration {sample.iteration} {_verdict(sample)}</h4>{_completion(sample)}</div>'
        for sample in (item.before, item.after)
    )
    return _card(item.before, f'<div class="pair">{answers}</div>', "")


def _trajectories(data: ReportData) -> str:
    if not data.samples:
        return ""
    iterations = sorted({sample.iteration for sample in data.samples})
    buttons = '<button value="" aria-pressed="true">all</button>' + "".join(
        f'<button value="{i}" aria-pressed="false">iteration {i}</button>' for i in iterations
    )
    notes = "".join(f" {text(note)}" for note in data.notes)
    key = (
        f'<p class="key"><span>advantage −{STRONGEST:g}<span class="ramp"></span>+{STRONGEST:g}</span>'
        '<span><span class="t u">underlined</span>: sampled with a probability below one half</span></p>'
    )
    cards = "".join(_trajectory(sample) for sample in data.samples)
    return (
        "<h2>Trajectories</h2><p>What the policy sampled in training, with the advantage that each token got: blue "
        f"was made likelier, orange less likely, without colour it did not count.{notes}</p>{key}"
        f'<div class="filters" role="group" aria-label="Iterations">{buttons}</div>{cards}'
    )


def _trajectory(sample: Sample) -> str:
    facts = [f"iteration <b>{sample.iteration}</b>", f"prompt <b>{text(sample.prompt_id)}</b>"]
    if sample.why:
        facts.append(text(sample.why))
    if sample.reward is not None:
        facts.append(f"reward <b>{sample.reward:.3g}</b>")
    facts += [f"{text(name)} <b>{value:.3g}</b>" for name, value in sample.parts.items()]
    if sample.advantage is not None:
        facts.append(f"advantage <b>{_signed(sample.advantage)}</b>{' (filtered)' if sample.filtered else ''}")
    if sample.finish == "length":
        facts.append("truncated")
    meta = "".join(f"<span>{fact}</span>" for fact in facts)
    body = f'<div class="meta">{_verdict(sample)}{meta}</div>{_completion(sample)}{_noted(sample)}'
    return _card(sample, body, f' data-iteration="{sample.iteration}"')


def _noted(sample: Sample) -> str:
    """What the reward terms noted: why the sample is unscored first."""
    notes = [f"Unscored: {sample.detail['error']}"] if "error" in sample.detail else []
    notes += [f"{name}: {value}" for name, value in sample.detail.items() if name != "error"]
    long = " long" if sum(map(len, notes)) > LONG_TEXT else ""
    return f'<p class="soft{long}">{" · ".join(text(note) for note in notes)}</p>' if notes else ""


def _card(sample: Sample, body: str, attributes: str) -> str:
    images = "".join(_image(image) for image in sample.images)
    long = " long" if len(sample.prompt) > LONG_TEXT else ""
    meta = "".join(f" · {text(name)}: {text(value)}" for name, value in sample.meta.items())
    about = f'<p class="soft">The better response is {sample.label}.{meta}</p>'
    prompt = f'<p class="prompt{long}">{text(sample.prompt)}</p>{about}'
    if not images:
        return f'<article class="card plain"{attributes}><div>{prompt}{body}</div></article>'
    return f'<article class="card"{attributes}><div>{images}</div><div>{prompt}{body}</div></article>'


def _verdict(sample: Sample) -> str:
    if sample.correct is None:
        return ""
    kind, mark = ("right", "✓") if sample.correct else ("wrong", "✗")
    return f'<span class="badge {kind}">{mark} {kind}</span>'


def _completion(sample: Sample) -> str:
    long = " long" if sum(len(token.text) for token in sample.tokens) > LONG_TEXT else ""
    return f'<p class="completion{long}">{"".join(_token(token) for token in _joined(sample.tokens))}</p>'


def _joined(tokens: Sequence[Token]) -> Iterable[Token]:
    """Tokens that show nothing of their own go to the next one's place: they have no width to colour."""
    return (token for token in tokens if token.text)


def _token(token: Token) -> str:
    if token.advantage is None and token.probability is None:
        return text(token.text)
    marks, about = ["t"], []
    style = ""
    if token.advantage is not None:
        depth = min(abs(token.advantage) / STRONGEST, 1.0) * DEEPEST
        if token.advantage:
            marks.append("p" if token.advantage > 0 else "n")
            style = f' style="--a:{depth:.0f}"'
        about.append(f"advantage {_signed(token.advantage)}")
    if token.probability is not None:
        marks += ["u"] if token.probability < UNSURE else []
        about.append(f"probability {token.probability:.3f}")
    return f'<span class="{" ".join(marks)}"{style} title="{", ".join(about)}">{text(token.text)}</span>'


def _image(data: bytes) -> str:
    kind = next((name for magic, name in IMAGE_TYPES if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        return '<p class="soft">An image of a kind that the page cannot show.</p>'
    return f'<img alt="image of the prompt" src="data:{kind};base64,{base64.b64encode(data).decode()}">'


def _configuration(data: ReportData) -> str:
    config = text(json.dumps(data.config, indent=2, ensure_ascii=False))
    rows = "".join(
        f"<tr><td>{text(name)}</td><td>{_number(value)}</td></tr>"
        for name, value in sorted((data.metrics[-1].metrics if data.metrics else {}).items())
    )
    last = (
        f"<details><summary>Every metric of the last iteration</summary><table>{rows}</table></details>" if rows else ""
    )
    return f"<h2>Run file</h2>{last}<details><summary>The validated run file</summary><pre>{config}</pre></details>"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if value else "0"


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "–"

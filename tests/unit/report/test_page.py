import re
from dataclasses import replace

from steadyhelm.report import Comparison, Evaluation, ReportData, Sample, Token, render_report
from steadyhelm.telemetry import MetricsLine

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00" * 8
EVIL = "</span><script>alert('x')</script><img src=\"http://evil.example/x\" onerror=alert(1)>&amp;"


def line(iteration: int, **metrics: float) -> MetricsLine:
    return MetricsLine(
        iteration=iteration, attempt=1, time="", metrics={k.replace("__", "/"): v for k, v in metrics.items()}
    )


def sample(text: str = "<think>5</think>", **changes) -> Sample:
    made = Sample(
        iteration=1,
        prompt_id="0:17",
        prompt="Which digit?",
        label=2,
        tokens=(Token(text=text, advantage=1.5, probability=0.25), Token(text="⏎", advantage=-6.0, probability=0.75)),
        images=(PNG,),
        reward=2.0,
        parts={"format": 1.0, "choice": 1.0},
        correct=True,
        advantage=1.5,
        why="highest reward",
    )
    return replace(made, **changes)


def data(**changes) -> ReportData:
    made = ReportData(
        run="digits-1",
        config={"algorithm": {"type": "stable_reinforce"}, "schedule": {"iterations": 3}, "seed": 7},
        metrics=tuple(line(i, reward__mean=1.0 + i / 4, reward__format=0.5, overhead__share=0.02) for i in (1, 2, 3)),
        evaluations=(
            Evaluation(
                iteration=0, metrics={"eval/accuracy": 0.7, "eval/accuracy_low": 0.65, "eval/accuracy_high": 0.75}
            ),
            Evaluation(iteration=3, metrics={"eval/accuracy": 0.95, "eval/both_orders": 0.9, "eval/pairs": 400.0}),
        ),
        samples=(sample(),),
        comparisons=(Comparison(before=sample(correct=False, iteration=0), after=sample(iteration=3)),),
        changes={(False, True): 12, (True, True): 30, (True, False): 1},
    )
    return replace(made, **changes)


def test_the_page_shows_the_run_its_accuracy_and_its_gain():
    page = render_report(data())
    assert "<title>digits-1 · Steadyhelm</title>" in page
    assert "stable_reinforce · 3 of 3 iterations · seed 7" in page
    assert "<b>95.0 %</b><em>+25.0 points since iteration 0</em>" in page
    assert (
        "<tr><th>wrong before</th><td>12</td><td>0</td></tr><tr><th>right before</th><td>30</td><td>1</td></tr>" in page
    )


def test_an_unfinished_run_says_so():
    assert "2 of 3 iterations, not finished" in render_report(data(metrics=(line(2, reward__mean=1.0),)))


def test_the_page_loads_nothing():
    page = render_report(data(samples=(sample(EVIL),)))
    assert "default-src 'none'; img-src data:;" in page
    tags = re.findall(r"<[a-zA-Z][^>]*>", page)
    for tag in tags:
        for attribute in re.findall(r"(?:src|href|srcset|action|data)=\"([^\"]*)\"", tag):
            assert attribute.startswith("data:"), tag
    assert not re.search(r"<(link|iframe|object|embed|base|form)\b", page)
    assert "@import" not in page
    assert "url(" not in page
    assert "fetch(" not in page


def test_what_policy_and_data_wrote_is_escaped_wherever_it_stands():
    evil = sample(
        EVIL, prompt=EVIL, prompt_id=EVIL, parts={EVIL: 1.0}, why=EVIL, meta={EVIL: EVIL}, detail={EVIL: EVIL}
    )
    page = render_report(
        data(
            run=EVIL,
            config={EVIL: EVIL},
            versions={EVIL: EVIL},
            samples=(evil,),
            comparisons=(Comparison(before=evil, after=evil),),
            metrics=(
                MetricsLine(iteration=1, attempt=1, time="", metrics={f"reward/{EVIL}": 1.0, "reward/mean": 1.0}),
            ),
            notes=(EVIL,),
        )
    )
    assert page.count("<script") == 1
    assert page.count("</script") == 1
    assert "<img src=" not in page
    assert "&lt;/span&gt;&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page


def test_only_the_pages_own_script_may_run():
    import base64
    import hashlib

    page = render_report(data())
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_control_and_direction_characters_become_visible():
    page = render_report(data(samples=(sample("a\x00b\x1bc\u202ed\ud800e"),)))
    assert "a␀b␛c\\u202ed\ufffde" in page


def test_tokens_are_coloured_by_the_sign_and_size_of_their_advantage():
    page = render_report(data())
    assert (
        '<span class="t p u" style="--a:32" title="advantage +1.50, probability 0.250">'
        "&lt;think&gt;5&lt;/think&gt;</span>"
        '<span class="t n" style="--a:65" title="advantage −6.00, probability 0.750">⏎</span>'
    ) in page


def test_a_token_that_did_not_count_has_no_colour():
    page = render_report(data(samples=(sample(tokens=(Token(text="zero", advantage=0.0),), filtered=True),)))
    assert '<span class="t" title="advantage 0">zero</span>' in page
    assert "(filtered)" in page


def test_a_card_says_why_its_sample_is_unscored_and_what_the_terms_noted():
    detail = {"choice": 2, "error": "brevity: it returned None: no score"}
    page = render_report(data(samples=(sample(reward=None, detail=detail),), comparisons=()))
    assert '<p class="soft">Unscored: brevity: it returned None: no score · choice: 2</p>' in page


def test_a_pairs_meta_stands_on_every_card_that_shows_it():
    shown = sample(meta={"source": "charts", "year": "2024"})
    page = render_report(data(samples=(shown,), comparisons=(Comparison(before=shown, after=shown),)))
    assert page.count("The better response is 2. · source: charts · year: 2024</p>") == 2


def test_images_are_embedded_and_unknown_kinds_are_said_to_be():
    page = render_report(data(samples=(sample(images=(PNG, b"<svg onload=alert(1)>")),), comparisons=()))
    assert page.count('src="data:image/png;base64,iVBORw0KGgoAAAAAAAAAAA=="') == 1
    assert "An image of a kind that the page cannot show." in page
    assert "svg onload" not in page


def test_a_run_without_anything_still_makes_a_page():
    page = render_report(ReportData(run="empty", config={}))
    assert "No iteration has been logged." in page
    assert "Trajectories" not in page


def test_values_that_are_not_finite_are_gaps():
    page = render_report(
        data(metrics=(line(1, reward__mean=float("nan")), line(2, reward__mean=1.0), line(3, reward__mean=2.0)))
    )
    assert "nan" not in page.lower().replace("nanometre", "")

"""What the learner groups under test are told to do."""

STABLE = {"type": "stable_reinforce"}
GRPO = {
    "type": "grpo",
    "beta": 0.1,
    "epochs": 2,
    "clip": 0.1,
    "correction": {"mode": "token", "cap": 1.5},
}
RELEASE = {
    "type": "reinforce_pp",
    "beta": 0.2,
    "gamma": 0.97,
    "normalization": "release",
    "filter": {"mode": "release"},
    "aggregation": "token",
}
SFT = {"type": "sft", "aggregation": "token"}


def run_file(algorithm=STABLE, *, dtype="float32", **learner):
    """A run file. AdamW's ε is large, so that an update is a smooth function of its gradient."""
    return {
        "name": "learner-test",
        "model": {"path": "given-by-the-spec", "dtype": dtype},
        "data": {"train": "task.py:pairs", "swap": "none"},
        "algorithm": algorithm,
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 12, "temperature": 0.9},
        "learner": {
            "train_batch": 6,
            "micro_batch": 4,
            "zero_stage": 2,
            "lr": 2e-3,
            "eps": 1e-4,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup_steps": 1,
            "max_norm": 0.5,
            **learner,
        },
        "schedule": {"iterations": 3, "prompts_per_iteration": 12 if algorithm["type"] == "sft" else 6},
    }


def case(run, *operations, worlds=(1, 2), exact_stage=True):
    return {"run": run, "operations": operations, "worlds": worlds, "exact_stage": exact_stage}


TWO = (["step", "1"], ["step", "2"], ["publish", None])
NONFINITE_STAGES = (0, 2, 3)
ONE = (["step", "1"], ["save", None])


def cases():
    """Every case by name; an argument ``$case/n`` is that case's answer to operation n, ``@`` the one-rank group's."""
    big = {"train_batch": 12, "max_norm": 1000.0}
    found = {f"gradient-{s}": case(run_file(zero_stage=s, micro_batch=(12, 1, 5, 4)[s], **big), *ONE) for s in range(4)}
    found |= {f"stable-{s}": case(run_file(zero_stage=s, micro_batch=(3, 6, 4, 2)[s]), *TWO) for s in range(4)}
    found |= {
        "grpo": case(run_file(GRPO), *TWO),
        "release": case(run_file(RELEASE, zero_stage=3), *TWO),
        "sft": case(run_file(SFT), *TWO),
        "recomputed": case(run_file(gradient_checkpointing=True), *TWO, worlds=(1,)),
        "frozen": case(run_file(freeze=["model.visual"]), ["publish", None], *TWO, ["save", None], worlds=(1,)),
        "bf16-2": case(run_file(dtype="bfloat16"), *TWO, ["save", None]),
        "bf16-3": case(run_file(dtype="bfloat16", zero_stage=3), *TWO, ["save", None]),
    }
    found["as-in-a-run"] = case(run_file(zero_stage=2, micro_batch=5, **big), *ONE, exact_stage=False)
    for stage, worlds in ((0, (1, 2)), (2, (1, 2)), (3, (1, 2))):
        name = f"resume-{stage}"
        found[name] = case(
            run_file(zero_stage=stage),
            ["step", "1"],
            ["save", None],
            ["step", "2"],
            ["publish", None],
            ["restore", f"${name}/1"],
            ["step", "2"],
            ["publish", None],
            ["restore", None],
            ["step", "1"],
            ["step", "2"],
            ["publish", None],
            worlds=worlds,
        )
    for stage in NONFINITE_STAGES:
        name = f"nan-weights-{stage}"
        found[name] = case(
            run_file(zero_stage=stage),
            ["save", None],
            ["poison", f"${name}/0"],
            ["restore", f"${name}/1"],
            ["publish", None],
            ["step", "1"],
            ["publish", f"${name}/3"],
            ["restore", f"${name}/0"],
            *TWO,
        )
        name = f"inf-gradient-{stage}"
        found[name] = case(
            run_file(zero_stage=stage), ["publish", None], ["overflow", "1"], ["publish", f"${name}/0"], *TWO
        )
    found |= {
        # of one rank at stage 2, taken up by two ranks at stage 3, and the other way round in memory layout
        "moved": case(run_file(zero_stage=3), ["restore", "@resume-2/1"], ["step", "2"], ["publish", None]),
        "moved-back": case(run_file(zero_stage=2), ["restore", "@resume-3/1"], ["step", "2"], ["publish", None]),
        "damaged": case(
            run_file(),
            ["save", None],
            ["damage", "$damaged/0"],
            ["restore", "$damaged/0"],
            ["restore", None],
            *TWO,
        ),
        "nan-reward": case(run_file(), ["publish", None], ["step", "nan-reward"], ["publish", "$nan-reward/0"], *TWO),
        "nan-logprobs": case(run_file(), ["step", "nan-logprobs"]),
        "strange-prefix": case(run_file(freeze=["visual"]), worlds=(1,)),
        "export": case(run_file(), ["step", "1"], ["publish", None], ["export", None], worlds=(1,)),
        "local": case({**run_file(zero_stage=3), "weights": {"type": "local"}}, ["publish", None]),
        "export-3": case(run_file(zero_stage=3), ["step", "1"], ["publish", None], ["export", None], worlds=(2,)),
    }
    return found

# Two commands on a fresh machine: `make demo` and `make test`. Both need Python 3.11+, make and pip, nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?=

.PHONY: bench-control bench-language resume-peers demo check test format mutants oracles oracles-trl golden scores methods rehearse trust-region over-optimisation stories real-data solve-time ablation supervise compatibility clean

demo: .venv/core ## PPO on CartPole-v1 until it is solved, live; then all of RLHF on a small made-up language
	$(BIN)/understudy control ppo --env CartPole-v1 --seed 1 --stop-at-return 475 $(if $(OUT),--out $(OUT))
	$(BIN)/understudy rehearse --seed 1 $(if $(OUT),--out $(patsubst %/,%,$(OUT))-rehearsal)

check: .venv/dev ## what CI checks before the tests: format, lint, types, layout
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -q tests/test_layout.py

test: .venv/dev ## every test, a file at a time on every core
	$(BIN)/pytest -n auto --dist loadfile

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

mutants: .venv/dev ## break the formulas one by one; each breakage must turn a test red
	$(BIN)/python tests/mutants.py

oracles: .venv-oracles/done ## run the peers on stored inputs and rewrite tests/oracles/*.json (CLEANRL=path to a checkout)
	.venv-oracles/bin/python tests/oracles/record.py $(if $(CLEANRL),--cleanrl $(CLEANRL))

oracles-trl: .venv-oracles-trl-1.16.0/done .venv-oracles-trl-1.12.0/done ## run TRL on stored inputs and rewrite tests/oracles/trl_*.json
	for version in 1.16.0 1.12.0; do .venv-oracles-trl-$$version/bin/python tests/oracles/record_trl.py || exit 1; done

resume-peers: .venv/dev .venv-oracles/done .venv-oracles-trl-1.16.0/done ## peers killed and resumed, beside ours: docs/resume-peers.md
	$(BIN)/python bench/resume_peers.py

bench-language: .venv/dev .venv-oracles-trl-1.16.0/done .venv-oracles-trl-1.12.0/done ## ours beside TRL and Hugging Face: the language part of docs/performance.md
	$(BIN)/python bench/language.py

bench-control: .venv/dev .venv-peers-sb3/done .venv-peers-cleanrl/done .venv-peers-purejaxrl/done ## ours beside SB3, SBX, CleanRL, PureJaxRL: the control part of docs/performance.md (CLEANRL=, PUREJAXRL= paths to checkouts; ROWS=)
	$(BIN)/python bench/control.py $(if $(ROWS),--rows $(ROWS)) $(if $(CLEANRL),--cleanrl $(CLEANRL)) $(if $(PUREJAXRL),--purejaxrl $(PUREJAXRL))

solve-time: .venv/dev ## seconds from process start until CartPole is solved, ten seeds
	$(BIN)/python bench/solve_time.py

golden: .venv/dev ## rewrite the golden runs; only for a change that should move numbers
	$(BIN)/python tests/golden/record.py

scores: .venv/dev ## ten seeds of the tuned presets, evaluated: bench/results/scores.json and docs/scores.md
	$(BIN)/python bench/scores.py

methods: .venv/dev ## every method on CartPole over twenty seeds
	$(BIN)/python bench/methods.py

rehearse: .venv/dev ## the rehearsal over 120 seeds: bench/results/rehearse and docs/rehearse.md
	$(BIN)/python bench/rehearse.py

trust-region: .venv/dev ## PPO at three times the rehearsal's learning rate, trust region on and off: docs/trust-region.md
	$(BIN)/python bench/trust_region.py

over-optimisation: .venv/dev ## best-of-n and PPO away from proxies of three data sizes: docs/over-optimisation.md and its picture
	$(BIN)/python bench/over_optimisation.py

stories: .venv/dev ## PPO on stories260K over twenty seeds: bench/results/stories and docs/stories.md (needs ../shared/data)
	$(BIN)/python bench/stories.py

real-data: .venv/dev ## reward model and DPO on human preferences, GRPO on GSM8K: docs/real-data.md (needs ../shared/data)
	$(BIN)/python bench/real_data.py

faults: .venv/dev ## inject every fault of tests/faults/table.py; writes docs/reliability.md
	$(BIN)/python -m tests.faults.report

ablation: .venv/dev ## Pendulum with and without correct bootstrapping at time limits
	$(BIN)/python bench/ablation_truncation.py

supervise: .venv/dev ## supervised environments beside AsyncVectorEnv: bench/results/supervise.json and docs/supervise.md
	$(BIN)/python bench/supervise.py

compatibility: .venv/dev ## models and environments of others, each trained correctly or refused: docs/compatibility-*.md
	$(BIN)/python bench/compatibility.py

clean:
	rm -rf .venv .venv-oracles .venv-oracles-trl-* .venv-peers-* build *.egg-info

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip uninstall --quiet --quiet --yes understudy # this package's name before, or another project
	$(PIP) torch
	$(PIP) -e .
	touch $@

.venv/dev: .venv/core
	$(PIP) -e '.[dev,box2d,mujoco,envpool,lora]'
	touch $@

.venv-oracles/done: tests/oracles/requirements.txt
	$(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-oracles/bin/python -m pip install --quiet --disable-pip-version-check -r tests/oracles/requirements.txt
	touch $@

.venv-oracles-trl-%/done: tests/oracles/requirements-trl.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/oracles/requirements-trl.txt trl==$*
	touch $@

.venv-peers-%/done: bench/peers/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	! grep -q '^torch' $< || $(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

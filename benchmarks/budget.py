"""The best plan by the number of plans that a search tries: strategies side by side on the same continuations.

    python benchmarks/budget.py [--prompts FILE.jsonl…] [--model M] [--domain D] [--trials N] [--skip-only]

Every plan, those of the published strategy included, is scored by its predicted speed-up (teacher-forced scoring and
the cost profile of this machine), so that strategies differ only in the plans they try. See `paper.py` for real
decoding.
"""

from __future__ import annotations

import argparse

import optuna
from _recipes import observed

from knn_ssd import Engine
from knn_ssd.bench.workload import read_workloads
from knn_ssd.calibrate.cost import measure_cost
from knn_ssd.calibrate.objective import TeacherForcedScorer
from knn_ssd.calibrate.search import Search, Strategy, create_study
from knn_ssd.plan import Mode

SHOWN = (8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--domain", default="math")
    parser.add_argument("--limit", type=int, default=4, help="prompts that plans are scored on")
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--strategies", nargs="+", default=[strategy.value for strategy in Strategy])
    parser.add_argument("--skip-only", action="store_true", help="no 4-bit weights, for any strategy")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, device="cpu", answers=False)
    backend = engine.backend
    low = Mode.LOW in backend.modes and not args.skip_only
    prompts = [prompt for prompt in read_workloads(args.prompts) if prompt.domain == args.domain]
    observations = observed(engine, prompts[: args.limit], args.max_new_tokens)
    cost = measure_cost(backend, low)
    budgets = [budget for budget in SHOWN if budget <= args.trials]
    print("| strategy | " + " | ".join(f"{budget} plans" for budget in budgets) + " |")
    print("|---|" + "--:|" * len(budgets))
    with TeacherForcedScorer(backend, observations, cost) as scorer:
        for name in args.strategies:
            study = create_study(optuna.storages.InMemoryStorage(), name)
            search = Search(study, Strategy(name), cost, num_layers=backend.num_layers, seed=args.seed, low=low)
            best, scores = 0.0, []
            while len(scores) < args.trials and (trial := search.ask()) is not None:
                score = scorer.score(trial.plan, best)
                search.tell(trial, score)
                best = max(best, score.speedup)
                scores.append(best)
            cells = [f"{scores[min(budget, len(scores)) - 1]:.3f}" for budget in budgets]
            print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""In which order the files of tests begin: the longest first, so that the processes end together that share them."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LONGEST = (
    "experiments/leak/test_leak.py",
    "experiments/rigs/cluster/test_cluster_bench.py",
    "experiments/rigs/lying/test_audit_bench.py",
    "integration/test_emulator_story.py",
    "integration/test_workers.py",
    "integration/test_real_model.py",
    "integration/test_faults.py",
    "edge/drafts/test_distribution.py",
    "experiments/generation/test_serve_bench.py",
    "daemon/tinker/test_tinker_training.py",
    "integration/test_sites_run.py",
    "integration/test_cli.py",
    "integration/test_chaos.py",
    "experiments/serving/test_tenants_bench.py",
    "kernels/test_triton.py",
    "experiments/generation/test_links_bench.py",
    "experiments/rigs/abuse/test_attacks.py",
    "experiments/generation/test_generate_bench.py",
    "fuzz/test_corpus.py",
    "integration/test_openai_story.py",
    "daemon/serving/test_answers.py",
    "backbone/peft_checks/test_peft_table.py",
    "test_lock.py",
    "daemon/jobs/test_job_runs.py",
    "daemon/page/test_page_in_browser.py",
    "daemon/page/test_page_of_a_daemon.py",
    "cli/test_daemon_commands.py",
    "daemon/tinker/test_tinker_crashes.py",
    "daemon/openai/test_openai_conformance.py",
    "experiments/rigs/network/test_link_bench.py",
    "integration/test_bench_quantize.py",
    "backbone/split/test_split_equals_whole.py",
    "experiments/serving/test_qos_bench.py",
    "edge/budget/test_leak_watch.py",
    "edge/training/test_draft_tuning.py",
    "experiments/rigs/secrets/test_secrets_bench.py",
    "edge/training/test_repeated_steps.py",
    "edge/training/test_labels_on_the_wire.py",
)
"""Whoever makes a file that takes more than a quarter of a minute puts it here."""


def begin_with_longest(items: list[pytest.Item]) -> None:
    """Sort tests; those of a file, and the files that are not among the longest, stay in their order."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))

"""Damaged checkpoints are refused in one line, or become directories that load."""

from benchmarks import fuzz_checkpoints, fuzzing


def test_two_hundred_fuzzed_checkpoints():
    result = fuzzing.fuzz(fuzz_checkpoints.TARGET, range(1_000_000, 1_000_200), seed=1, num_workers=2, limit=120)
    assert result.findings == []
    counts = {kind: outcomes.total() for kind, outcomes in result.outcomes.items()}
    assert counts == {kind: 2 * share for kind, share in fuzz_checkpoints.KINDS.items()}
    for kind, outcomes in result.outcomes.items():
        words = {outcome.split(":")[0] for outcome in outcomes}
        assert words == {"stored", "skipped"}, f"{kind}: one outcome alone tests little"


def test_an_input_can_be_repeated():
    for number in (0, 3):
        assert fuzz_checkpoints.TARGET.run(2, number) == fuzz_checkpoints.TARGET.run(2, number)

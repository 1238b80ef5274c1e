"""Faults to plant in the Python code, each with the tests that must turn red."""

from tests.mutations.mutation import Mutation

GPTQ = "duqpp/calibration/gptq.py"
HESSIAN = "duqpp/calibration/hessian.py"
SMOOTHING = "duqpp/calibration/smoothing.py"
STATISTICS = "duqpp/calibration/statistics.py"
DRIFT = "duqpp/calibration/drift.py"
TOKENS = "duqpp/calibration/tokens.py"
SHARD = "duqpp/checkpoint/shard.py"
LAYOUT = "duqpp/checkpoint/layout.py"
CARD = "duqpp/checkpoint/card.py"
SCHEDULE = "duqpp/methods/refine/schedule.py"
GENERATE = "duqpp/tools/generate.py"
INSPECTION = "duqpp/tools/inspection.py"

GPTQ_TESTS = "tests/calibration/test_gptq.py"
HESSIAN_TESTS = "tests/calibration/test_hessian.py"
SMOOTHING_TESTS = "tests/calibration/test_smoothing.py"
STATISTICS_TESTS = "tests/calibration/test_statistics.py"
DRIFT_TESTS = "tests/calibration/test_drift.py"
TOKENS_TESTS = "tests/calibration/test_tokens.py"
SHARD_TESTS = "tests/checkpoint/test_shard.py"
LAYOUT_TESTS = "tests/checkpoint/test_layout.py"
CARD_TESTS = "tests/integrations/test_saving.py"
GUARD_TESTS = "tests/integrations/test_guard.py"
SCHEDULE_TESTS = "tests/methods/refine/test_schedule.py"

MUTATIONS = (
    # Calibration.
    Mutation(
        "gptq: dead columns count in the damping",
        GPTQ,
        "diagonal[~dead].double().mean() if",
        "diagonal.double().mean() if",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: dead columns keep their weights",
        GPTQ,
        "remaining[:, hessian.diagonal()[columns] == 0] = 0.0",
        "pass",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: an error is not in units of its column",
        GPTQ,
        "decode_e2m1(code) * scale) / corner[j, j]",
        "decode_e2m1(code) * scale)",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: errors stay in their block",
        GPTQ,
        "remaining[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1.0)",
        "pass",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: scales in the order of rounding",
        GPTQ,
        "scales[:, blocks.argsort()]",
        "scales[:, blocks]",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: blocks by rising diagonal",
        GPTQ,
        "argsort(descending=True, stable=True)",
        "argsort(descending=False, stable=True)",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: damping doubled, not tenfold",
        GPTQ,
        "damping * 10.0**attempt * mean",
        "damping * 2.0**attempt * mean",
        GPTQ_TESTS,
    ),
    Mutation(
        "hessian: of the mean, not twice the mean",
        HESSIAN,
        "mul_(2.0 / tokens)",
        "mul_(1.0 / tokens)",
        HESSIAN_TESTS,
    ),
    Mutation(
        "hessian: tokens of the last rows alone",
        HESSIAN,
        "self._tokens += len(x)",
        "self._tokens = len(x)",
        HESSIAN_TESTS,
    ),
    Mutation(
        "hessian: transformed from one side twice",
        HESSIAN,
        "apply(half.T.contiguous())",
        "apply(half)",
        HESSIAN_TESTS,
    ),
    Mutation(
        "smoothing: one exponent for both sides",
        SMOOTHING,
        "- (1 - alpha) * weight[used].log()",
        "- alpha * weight[used].log()",
        SMOOTHING_TESTS,
    ),
    Mutation(
        "smoothing: scales of all but unused channels are not bounded",
        SMOOTHING,
        ".exp().clamp_(_LEAST, _MOST)",
        ".exp()",
        SMOOTHING_TESTS,
    ),
    Mutation(
        "smoothing: heads that share a value averaged",
        SMOOTHING,
        ".amax(1).flatten()",
        ".mean(1).flatten()",
        SMOOTHING_TESTS,
    ),
    Mutation(
        "smoothing: a channel may vanish",
        SMOOTHING,
        "rounded.isfinite() & (rounded != 0)",
        "rounded.isfinite()",
        SMOOTHING_TESTS,
    ),
    Mutation(
        "statistics: samples are views of their batch",
        STATISTICS,
        "x[local - self.tokens].clone()",
        "x[local - self.tokens].narrow(0, 0, len(local)) if len(local) < len(x) else x",
        STATISTICS_TESTS,
    ),
    Mutation(
        "statistics: peaks by value, not by magnitude",
        STATISTICS,
        "x[:, raised].abs().argmax(0)",
        "x[:, raised].argmax(0)",
        STATISTICS_TESTS,
    ),
    Mutation(
        "statistics: the sample starts anew with each batch",
        STATISTICS,
        "self.tokens += len(x)",
        "self.tokens = len(x)",
        STATISTICS_TESTS,
    ),
    Mutation(
        "drift: not damped in units of the Hessian",
        DRIFT,
        "_DAMPING * hessian.diagonal().double().mean()",
        "_DAMPING",
        DRIFT_TESTS,
    ),
    Mutation(
        "drift: transposed",
        DRIFT,
        "(weight @ drift).double().T",
        "(weight @ drift.T).double().T",
        DRIFT_TESTS,
    ),
    Mutation(
        "tokens: the last start of a stretch never comes up",
        TOKENS,
        "stretch - seq_len + 1, (samples,)",
        "max(stretch - seq_len, 1), (samples,)",
        TOKENS_TESTS,
    ),
    Mutation(
        "tokens: exactly enough text is too little",
        TOKENS,
        "if stretch < seq_len:",
        "if stretch <= seq_len:",
        TOKENS_TESTS,
    ),
    Mutation(
        "tokens: the parts of the built-in text share a page",
        TOKENS,
        "pages[boundary:]",
        "pages[boundary - 1 :]",
        TOKENS_TESTS,
    ),
    Mutation(
        "tokens: calibration on the test split",
        TOKENS,
        '("train" if part == "calibration" else "test")',
        '("test" if part == "calibration" else "train")',
        TOKENS_TESTS,
    ),
    Mutation(
        "tokens: special tokens in the text",
        TOKENS,
        "add_special_tokens=False",
        "add_special_tokens=True",
        TOKENS_TESTS,
    ),
    # Checkpoints.
    Mutation(
        "shard: bytes before words",
        SHARD,
        "(-tensors[name].element_size(), name)",
        "(tensors[name].element_size(), name)",
        "tests/job/test_golden.py",
    ),
    Mutation(
        "shard: a tensor without a checksum passes",
        SHARD,
        "!= checksums.get(name):",
        '!= checksums.get(name, f"{zlib.crc32(data):08x}"):',
        SHARD_TESTS,
    ),
    Mutation(
        "shard: finished blocks are read unverified",
        SHARD,
        "    verify_shard(path)\n    return load_file(path)",
        "    return load_file(path)",
        "tests/job/test_resume.py::test_finished_blocks_are_verified",
    ),
    Mutation(
        "shard: a scale of NaN passes",
        SHARD,
        'name.endswith(".weight_scale") and NAN_SCALE in data',
        'name.endswith(".weight_scale") and not data',
        SHARD_TESTS,
    ),
    Mutation(
        "shard: a gap between tensors passes",
        SHARD,
        "if begin != position or end - begin",
        "if end - begin",
        SHARD_TESTS,
    ),
    Mutation(
        "shard: a permutation may name a channel twice",
        SHARD,
        "if not torch.equal(channels, torch.arange(len(channels), dtype=torch.int32)):",
        "if channels.numel() and (channels[0] < 0 or channels[-1] >= len(channels)):",
        SHARD_TESTS,
    ),
    Mutation(
        "shard: a tensor in two shards passes",
        SHARD,
        "            if name in found:",
        "            if name in found and found[name] == shard:",
        SHARD_TESTS,
    ),
    Mutation(
        "shard: a rotation in another dtype passes",
        SHARD,
        'exact = not expected.is_floating_point() or name.endswith("rotation")',
        "exact = not expected.is_floating_point()",
        SHARD_TESTS,
    ),
    Mutation(
        "shard: a shard outside of the folder is read",
        SHARD,
        "if Path(shard).name != shard or not",
        "if not",
        SHARD_TESTS,
    ),
    Mutation(
        "shard: a saved shard keeps the checksums of the others",
        SHARD,
        "for name in sorted(header) if name in checksums}",
        "for name in sorted(checksums)}",
        f"{SHARD_TESTS} {CARD_TESTS}",
    ),
    Mutation(
        "shard: metadata may run into the tensors",
        SHARD,
        "if len(text) > start - 8:",
        "if len(text) > start:",
        f"{SHARD_TESTS} {CARD_TESTS}",
    ),
    Mutation(
        "shard: a byte of codes is one weight",
        SHARD,
        "weights += 2 * (end - begin)",
        "weights += end - begin",
        "tests/evaluation/test_compare.py::test_storage_counts_codes_scales_and_rotations",
    ),
    Mutation(
        "layout: a newer format is read",
        LAYOUT,
        "if version > FORMAT_VERSION:",
        "if version > FORMAT_VERSION + 1:",
        LAYOUT_TESTS,
    ),
    Mutation(
        "layout: format 0 is read",
        LAYOUT,
        "type(version) is not int or version < 1:",
        "type(version) is not int or version < 0:",
        LAYOUT_TESTS,
    ),
    Mutation(
        "layout: the weights' rule for activations",
        LAYOUT,
        'activation_rule=_rule(rules, "activations")',
        'activation_rule=_rule(rules, "weights")',
        LAYOUT_TESTS,
    ),
    Mutation(
        "layout: a resumed block computes on unprepared weights",
        LAYOUT,
        "            module.prepare()\n    return block",
        "            pass\n    return block",
        "tests/job/test_resume.py::test_finished_blocks_behind_the_last_one_to_make_are_not_run",
    ),
    Mutation(
        "card: a folder's name is taken for a model of the hub",
        CARD,
        'on_hub = "/" in base',
        "on_hub = bool(base)",
        CARD_TESTS,
    ),
    Mutation(
        "card: someone's own card is written over",
        CARD,
        "if CARD_MARK not in text and _PLACEHOLDER not in text:",
        "if not text:",
        CARD_TESTS,
    ),
    Mutation(
        "card: the sequences that calibrate for those that refine",
        CARD,
        'count = "refine_samples" if refine else "samples"',
        'count = "samples"',
        CARD_TESTS,
    ),
    Mutation(
        "card: a saved model loses its guard",
        CARD,
        "if config.get(GUARD_FIELD) != GUARD:",
        "if config.get(GUARD_FIELD, GUARD) != GUARD:",
        GUARD_TESTS,
    ),
    # Tools.
    Mutation(
        "generate: the last position is not used",
        GENERATE,
        "prompt_tokens + max_new_tokens > limit:",
        "prompt_tokens + max_new_tokens >= limit:",
        "tests/tools/test_generate.py",
    ),
    Mutation(
        "inspect: blocks are fed by quantized ones",
        INSPECTION,
        'config = replace(config, next_inputs="float")',
        "config = replace(config)",
        "tests/tools/test_inspection.py",
    ),
    # Refinement.
    Mutation(
        "schedule: warm-up starts at nothing",
        SCHEDULE,
        "min(1.0, (step + 1) / _WARM_UP_STEPS)",
        "min(1.0, step / _WARM_UP_STEPS)",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "schedule: the rate stays as it is",
        SCHEDULE,
        "_LAST_RATE = 0.05",
        "_LAST_RATE = 1.0",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "schedule: one batch is held back, however many there are",
        SCHEDULE,
        "max(1, batches // _HELD_SHARE)",
        "1",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "schedule: a loss that is no number is as good as the least",
        SCHEDULE,
        "elif found <= _WORSE * self.least:",
        "elif not found > _WORSE * self.least:",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "schedule: rates are not in units of the weight",
        SCHEDULE,
        "square().mean().sqrt()) if relative",
        "square().mean()) if relative",
        SCHEDULE_TESTS,
    ),
)

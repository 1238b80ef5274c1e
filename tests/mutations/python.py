"""Faults to plant in the Python code, each with the tests that must turn red."""

from tests.mutations.mutation import Mutation

GPTQ = "duqpp/calibration/gptq.py"
GPTQ_BLOCK = "duqpp/ops/gptq_block.py"
HESSIAN = "duqpp/calibration/hessian.py"
DEVICES = "duqpp/placement/devices.py"
RANKS = "duqpp/placement/ranks.py"
AGREEMENT = "duqpp/job/agreement.py"
SMOOTHING = "duqpp/calibration/smoothing.py"
STATISTICS = "duqpp/calibration/statistics.py"
DRIFT = "duqpp/calibration/drift.py"
TOKENS = "duqpp/calibration/tokens.py"
SHARD = "duqpp/checkpoint/shard.py"
LAYOUT = "duqpp/checkpoint/layout.py"
MANIFEST = "duqpp/checkpoint/manifest.py"
CARD = "duqpp/checkpoint/card.py"
FAMILY = "duqpp/models/family.py"
STACK = "duqpp/models/stack.py"
STANDING = "duqpp/models/standing.py"
WEIGHTS = "duqpp/models/weights.py"
POSITIONS = "duqpp/models/positions.py"
GROUP = "duqpp/methods/group.py"
INDEPENDENT = "duqpp/methods/independent.py"
SEQUENTIAL = "duqpp/methods/sequential.py"
METHOD_SMOOTHING = "duqpp/methods/smoothing.py"
FIXED = "duqpp/methods/fixed.py"
OPTIONS = "duqpp/methods/options.py"
LEARNED = "duqpp/methods/learned.py"
SCHEDULE = "duqpp/methods/refine/schedule.py"
LATENT = "duqpp/methods/refine/latent.py"
LINEAR = "duqpp/nn/linear.py"
PREPARED = "duqpp/nn/prepared.py"
SAVING = "duqpp/integrations/saving.py"
TRANSFORMS = "duqpp/checkpoint/transforms.py"
SHARED_INPUT = "duqpp/nn/shared_input.py"
REFINE_BLOCKS = "duqpp/methods/refine/blocks.py"
DISTILL = "duqpp/methods/refine/distill.py"
LATENT_MODEL = "duqpp/methods/refine/latent_model.py"
TRAINING_STATE = "duqpp/methods/refine/training_state.py"
JOB = "duqpp/job/quantize.py"
STAGES = "duqpp/placement/stages.py"
JOB_BLOCKS = "duqpp/job/blocks.py"
JOB_OVERLAP = "duqpp/job/overlap.py"
PLACEMENT_TESTS = "tests/job/test_placement.py"
JOB_CALIBRATION = "duqpp/job/calibration.py"
JOB_FOLDER = "duqpp/job/folder.py"
JOB_DISTILLATION = "duqpp/job/distillation.py"
PERPLEXITY = "duqpp/evaluation/perplexity.py"
FINAL_STATES = "duqpp/evaluation/final_states.py"
DIVERGENCE = "duqpp/evaluation/divergence.py"
SCORES = "duqpp/evaluation/scores.py"
COMPARE = "duqpp/evaluation/compare.py"
COMPARE_FOLDER = "duqpp/evaluation/folder.py"
CLI_MAIN = "duqpp/cli/main.py"
CLI_OPTIONS = "duqpp/cli/options.py"
TABLES = "duqpp/cli/tables.py"
PROGRESS = "duqpp/cli/progress.py"
GENERATE = "duqpp/tools/generate.py"
INSPECTION = "duqpp/tools/inspection.py"
COSTS = "duqpp/methods/costs.py"
JOB_PLAN = "duqpp/job/plan.py"
SHAPES = "duqpp/models/shapes.py"

GPTQ_TESTS = "tests/calibration/test_gptq.py"
GPTQ_BLOCK_TESTS = "tests/ops/test_gptq_block.py"
HESSIAN_TESTS = "tests/calibration/test_hessian.py"
RANKS_TESTS = "tests/placement/test_ranks.py"
RANKS_JOB_TESTS = "tests/job/test_ranks.py"
SMOOTHING_TESTS = "tests/calibration/test_smoothing.py"
STATISTICS_TESTS = "tests/calibration/test_statistics.py"
DRIFT_TESTS = "tests/calibration/test_drift.py"
TOKENS_TESTS = "tests/calibration/test_tokens.py"
SHARD_TESTS = "tests/checkpoint/test_shard.py"
LAYOUT_TESTS = "tests/checkpoint/test_layout.py"
MANIFEST_TESTS = "tests/checkpoint/test_manifest.py"
CARD_TESTS = "tests/integrations/test_saving.py"
GUARD_TESTS = "tests/integrations/test_guard.py"
WEIGHTS_TESTS = "tests/models/test_weights.py"
POSITIONS_TESTS = "tests/models/test_positions.py"
FAMILY_TESTS = "tests/models/test_family.py"
MODULE_TESTS = "tests/integrations/test_module.py"
EDITS_TESTS = "tests/integrations/test_saving_edits.py"
SHARED_INPUT_TESTS = "tests/nn/test_shared_input.py"
DIRECT_CALL_TESTS = "tests/nn/test_direct_call.py"
JOINED_TESTS = "tests/nn/test_joined.py"
REFERENCE = "duqpp/ops/reference.py"
SILENT_TESTS = "tests/methods/test_silent.py"
GROUP_TESTS = "tests/methods/test_group.py"
INDEPENDENT_TESTS = "tests/methods/test_independent.py"
SEQUENTIAL_TESTS = "tests/methods/test_sequential.py"
LEARNED_TESTS = "tests/methods/test_learned.py"
SCHEDULE_TESTS = "tests/methods/refine/test_schedule.py"
LATENT_TESTS = "tests/methods/refine/test_latent.py"
REFINE_BLOCKS_TESTS = "tests/methods/refine/test_blocks.py"
DISTILL_TESTS = "tests/methods/refine/test_distill.py"
JOB_TESTS = "tests/job/test_quantize.py"
STAGES_TESTS = "tests/placement/test_stages.py"
RESUME_TESTS = "tests/job/test_resume.py"
PERPLEXITY_TESTS = "tests/evaluation/test_perplexity.py"
STREAMING_TESTS = "tests/evaluation/test_streaming.py"
DIVERGENCE_TESTS = "tests/evaluation/test_divergence.py"
COMPARE_TESTS = "tests/evaluation/test_compare.py"
OPTIONS_TESTS = "tests/cli/test_options.py"
TABLES_TESTS = "tests/cli/test_tables.py"
TERMINAL_TESTS = "tests/cli/test_terminal.py"
PROGRESS_TESTS = "tests/cli/test_progress.py"
COVER = "duqpp/ops/cover.py"
SELFCHECK = "duqpp/tools/selfcheck.py"
GEMM_CHECKS = "duqpp/tools/gemm_checks.py"

MUTATIONS = (
    Mutation(
        "native: an old driver found out at the first launch",
        "duqpp/ops/native.py",
        "return driver_refusal() if reason is None else reason",
        "return reason",
        "tests/ops/test_native.py"
        "::test_a_driver_that_is_too_old_for_the_library_is_named_before_a_launch",
    ),
    Mutation(
        "selfcheck: no product has more tiles than the GPU has SMs",
        COVER,
        "range(1, MOST_WAVES * at_once // few + 1, _STEP)",
        "range(1, at_once // few + 1, _STEP)",
        "tests/ops/test_cover.py",
    ),
    Mutation(
        "selfcheck: every product has one tile along K",
        COVER,
        "(_SHORT_K, (_LONG_TILES - 1) * k + BLOCK_SIZE)",
        "(_SHORT_K, k)",
        "tests/ops/test_cover.py",
    ),
    Mutation(
        "selfcheck: what torch multiplies counted for a kernel",
        COVER,
        "if known is not None and known.at(self.N, self.K) <= self.M:",
        "if known is not None and known.at(self.N, self.K) < 0:",
        "tests/ops/test_cover.py::test_products_of_many_rows_are_not_for_a_kernel",
    ),
    Mutation(
        "selfcheck: stream-K among the other checks",
        SELFCHECK,
        "with streamk(False) if on_gpu",
        "with streamk(True) if on_gpu",
        "tests/tools/test_selfcheck.py::test_streamk_is_checked_after_all_else_and_then_timed",
    ),
    Mutation(
        "selfcheck: stream-K that failed is timed",
        SELFCHECK,
        "with streamk(works):",
        "with streamk(True):",
        "tests/tools/test_selfcheck.py::test_streamk_that_fails_is_not_timed",
    ),
    Mutation(
        "selfcheck: each product with one bias",
        GEMM_CHECKS,
        "pairs = list(product(out_dtypes(device), _BIASES))",
        "pairs = list(product(out_dtypes(device), _BIASES[-1:]))",
        "tests/tools/test_gemm_checks.py::test_a_wrong_kernel_is_found",
    ),
    Mutation(
        "selfcheck: one end of the scales for both",
        GEMM_CHECKS,
        '"smallest": (-126, 127)}',
        '"smallest": (127, -126)}',
        "tests/tools/test_gemm_checks.py::test_a_wrong_scale_is_found",
    ),
    # Calibration.
    Mutation(
        "gptq: dead columns count in the damping",
        GPTQ,
        "diagonal[~dead].double().mean() if",
        "diagonal.double().mean() if",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: rows stay that rounding to nearest serves better",
        GPTQ,
        "below = loss > 0",
        "below = loss > loss.max()",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: silent channels are not excited",
        GROUP,
        "excite_silent(hessian, plan.silent, plan.transform.apply)",
        "pass",
        SILENT_TESTS,
    ),
    Mutation(
        "duqpp: a basis gives up silent channels",
        SEQUENTIAL,
        "activation_moments = with_silent_excited(activation_moments, plan.silent)",
        "pass",
        SILENT_TESTS,
    ),
    Mutation(
        "reference: no segments along K",
        REFERENCE,
        "SEGMENT_BLOCKS = 16 ",
        "SEGMENT_BLOCKS = 64 ",
        "tests/ops/test_mxfp4_gemm.py",
    ),
    Mutation(
        "gptq: a block starts from what is fed into it, its own columns as they are",
        GPTQ,
        "torch.addmm(weight[:, own], here, self.corners[index])",
        "weight[:, own] + here",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: an error of a block stays in its column",
        GPTQ_BLOCK,
        "(columns[j] - rounded[j]) * factor[j, j + 1 :, None]",
        "0 * factor[j, j + 1 :, None]",
        GPTQ_BLOCK_TESTS,
    ),
    Mutation(
        "gptq: the block of one row is changed in place",
        GPTQ_BLOCK,
        "values.T.clone(memory_format=torch.contiguous_format)",
        "values.T.contiguous()",
        GPTQ_BLOCK_TESTS,
    ),
    Mutation(
        "gptq: errors stay in their block",
        GPTQ,
        "here.addmm_(differences[:, : start - done], self.factor[done:start, start:stop])",
        "pass",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: errors reach 256 columns",
        GPTQ,
        "fed[:, stop:].addmm_(differences, self.factor[done:stop, stop:])",
        "pass",
        GPTQ_TESTS,
    ),
    Mutation(
        "gptq: scales in the order of rounding",
        GPTQ,
        "codes[:, block], scales[:, block], compensated",
        "codes[:, block], scales[:, index], compensated",
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
        "ranks: the last items are nobody's",
        RANKS,
        "items * rank // self.count for rank",
        "items // self.count * rank for rank",
        RANKS_TESTS,
    ),
    Mutation(
        "ranks: every rank says why it fails",
        RANKS,
        "return bool(store.add(_FAILURES, 1) == 1)",
        "return True",
        RANKS_TESTS,
    ),
    Mutation(
        "ranks: who waits for a rank that is gone waits on",
        RANKS,
        "and not ended.wait(_GRACE)",
        "and ended.wait()",
        RANKS_TESTS,
    ),
    Mutation(
        "ranks: no GPU of their own",
        RANKS,
        "return torch.device(device.type, local_rank())",
        "return device",
        RANKS_TESTS,
    ),
    Mutation(
        "agreement: each rank agrees with itself",
        AGREEMENT,
        "descriptions = placement.ranks.all(own)",
        "descriptions = [own]",
        RANKS_JOB_TESTS,
    ),
    Mutation(
        "hessian: a sum that was taken stays in memory",
        HESSIAN,
        "self._sum.new_empty(0)",
        "self._sum[:0]",
        HESSIAN_TESTS,
    ),
    Mutation(
        "hessian: of this rank's tokens alone",
        HESSIAN,
        "total, self._sum = ranks.sum_(self._sum), self._sum.new_empty(0)",
        "total, self._sum = self._sum, self._sum.new_empty(0)",
        STATISTICS_TESTS,
    ),
    Mutation(
        "hessian: batches are summed up in float32",
        HESSIAN,
        "torch.zeros(channels, channels, dtype=torch.float64, device=device)",
        "torch.zeros(channels, channels, dtype=torch.float32, device=device)",
        HESSIAN_TESTS,
    ),
    Mutation(
        "statistics: each rank samples as if it were the first",
        STATISTICS,
        "sample.to(device) - before",
        "sample.to(device)",
        STATISTICS_TESTS,
    ),
    Mutation(
        "statistics: of two ranks with a peak the last counts",
        STATISTICS,
        "ranks.gather(self.amax[None]).argmax(0) == ranks.index",
        "ranks.count - 1 - ranks.gather(self.amax[None]).flip(0).argmax(0) == ranks.index",
        STATISTICS_TESTS,
    ),
    Mutation(
        "duqpp: each rank's transform is of its own tokens",
        SEQUENTIAL,
        "ranks.sum_(second_moments(x, parts))",
        "second_moments(x, parts)",
        RANKS_JOB_TESTS,
    ),
    Mutation(
        "hessian: tokens of the last rows alone",
        HESSIAN,
        "self.tokens += len(x)",
        "self.tokens = len(x)",
        HESSIAN_TESTS,
    ),
    Mutation(
        "hessian: what is below the diagonal is left out",
        HESSIAN,
        "total[rows, :start] = total[:start, rows].T",
        "pass",
        HESSIAN_TESTS,
    ),
    Mutation(
        "hessian: every sum is taken for symmetric",
        HESSIAN,
        "slice(start if self._symmetric else 0, None)",
        "slice(start, None)",
        HESSIAN_TESTS,
    ),
    Mutation(
        "hessian: transformed from one side twice",
        HESSIAN,
        "turned = half.T.contiguous()",
        "turned = half",
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
        "drift: transposed, of few rows",
        DRIFT,
        "(weight @ drift).double().T",
        "(weight @ drift.T).double().T",
        DRIFT_TESTS,
    ),
    Mutation(
        "drift: transposed, of many rows",
        DRIFT,
        "_solve_(factor, drift.double().T)",
        "_solve_(factor, drift.double())",
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
        "if checksum(data) != self.checksum:",
        "if self.checksum and checksum(data) != self.checksum:",
        SHARD_TESTS,
    ),
    Mutation(
        "shard: finished blocks are read unverified",
        SHARD,
        "{each.name: each.read() for each in shard_contents(path)}",
        "safetensors.torch.load_file(path)",
        "tests/job/test_resume.py::test_finished_blocks_are_verified",
    ),
    Mutation(
        "shard: a scale of NaN passes",
        SHARD,
        "(flat.view(torch.uint8) == NAN_SCALE).any()",
        "(flat.view(torch.uint8) > NAN_SCALE).any()",
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
        "if not torch.equal(channels, torch.arange(len(channels), ",
        "if torch.equal(channels + len(channels), torch.arange(len(channels), ",
        SHARD_TESTS,
    ),
    Mutation(
        "shard: a tensor in two shards passes",
        SHARD,
        "        if name in found:\n",
        "        if name in found and found[name].shard == shard:\n",
        SHARD_TESTS,
    ),
    Mutation(
        "shard: a rotation in another dtype passes",
        SHARD,
        'not expected.is_floating_point() or name.endswith("rotation")',
        "not expected.is_floating_point()",
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
        "manifest: a shard by its length alone",
        MANIFEST,
        "hashlib.sha256(header_bytes(path))",
        "hashlib.sha256(header_bytes(path)[:8])",
        MANIFEST_TESTS,
    ),
    Mutation(
        "manifest: a missing file is none of its concern",
        MANIFEST,
        'None if is_partial else "it is missing"',
        "None",
        MANIFEST_TESTS,
    ),
    Mutation(
        "manifest: added files are not looked for",
        MANIFEST,
        "present - set(files)",
        "set(files) - set(files)",
        MANIFEST_TESTS,
    ),
    Mutation(
        "manifest: its own digest is not checked",
        MANIFEST,
        "digest != _own_digest(values) or content",
        "content",
        MANIFEST_TESTS,
    ),
    Mutation(
        "manifest: a saved model's covers the tokenizer beside it",
        CARD,
        "write_manifest(folder, MODEL_FILES)",
        "write_manifest(folder)",
        MANIFEST_TESTS,
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
        "text: a byte order mark is read as text",
        TOKENS,
        'codecs.BOM_UTF8: "utf-8-sig"',
        'codecs.BOM_UTF8: "utf-8"',
        TOKENS_TESTS,
    ),
    Mutation(
        "text: a pipe whose writer comes late is empty",
        TOKENS,
        "elif time.monotonic() < until:",
        "elif False:",
        TOKENS_TESTS,
    ),
    Mutation(
        "text: a slice is cut at its colon",
        TOKENS,
        "(?::([^:]*)(?::(.*))?)?",
        "(?::([^:]*)(?::([^:]*).*)?)?",
        TOKENS_TESTS,
    ),
    Mutation(
        "errors: a panic in Rust passes",
        "duqpp/errors.py",
        'if type(error).__module__ != "pyo3_runtime":',
        "if True:",
        "tests/test_errors.py",
    ),
    Mutation(
        "command: a full disk goes unseen",
        CLI_MAIN,
        "        sys.stdout.flush()\n",
        "        pass\n",
        TERMINAL_TESTS,
    ),
    Mutation(
        "command: what the terminal cannot show is an error",
        CLI_MAIN,
        'stream.reconfigure(errors="backslashreplace")',
        "stream.flush()",
        TERMINAL_TESTS,
    ),
    Mutation(
        "tables: brackets in a name are markup",
        TABLES,
        "markup=False",
        "markup=True",
        TERMINAL_TESTS,
    ),
    Mutation(
        "generate: a temperature that is not a number is greedy",
        GENERATE,
        "if not 0 <= temperature < math.inf:",
        "if temperature < 0:",
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
        "schedule: ranks have the batches that only refine where their first ones are",
        SCHEDULE,
        "before = sum(own[:kind])",
        "before = 0",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "schedule: a rank without the batch steps by a gradient of its own",
        SCHEDULE,
        "ranks.broadcast_(parameter.grad, batch.rank)",
        "ranks.broadcast_(parameter.grad.clone(), batch.rank)",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "schedule: a loss is the mean of what one rank holds back",
        SCHEDULE,
        "sum(chain(*ranks.all(own))) / len(batches)",
        "sum(own) / len(batches)",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "duqpp: ranks refine on their batches in turn, and not in the order of one process",
        SEQUENTIAL,
        "calibrating=streams.calibrating,",
        "calibrating=0,",
        RANKS_JOB_TESTS,
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
        "weight.detach().square().mean().sqrt()",
        "weight.detach().square().mean()",
        SCHEDULE_TESTS,
    ),
    # Methods.
    Mutation(
        "group: an error is relative to what was made of it",
        GROUP,
        "torch.stack(((value - exact).norm(), exact.norm()))",
        "torch.stack(((value - exact).norm(), value.norm()))",
        f"{GROUP_TESTS} {INDEPENDENT_TESTS} {SEQUENTIAL_TESTS}",
    ),
    Mutation(
        "group: errors of the first rows alone",
        GROUP,
        "return spread.round().long()",
        "return torch.arange(len(spread), device=HOST)",
        f"{GROUP_TESTS} {INDEPENDENT_TESTS} {SEQUENTIAL_TESTS}",
    ),
    Mutation(
        "group: the generator of a group does not know the seed",
        GROUP,
        'f"{seed}/{name}".encode()',
        "name.encode()",
        f"{GROUP_TESTS} {INDEPENDENT_TESTS}",
    ),
    Mutation(
        "calibration: statistics imply a device",
        "duqpp/calibration/statistics.py",
        "self.amax = torch.zeros(channels, dtype=torch.float32, device=device)",
        "self.amax = torch.zeros(channels, dtype=torch.float32)",
        f"{PLACEMENT_TESTS}::test_blocks_are_quantized_where_the_device_says",
    ),
    Mutation(
        "rotation: a balanced transform implies a device",
        "duqpp/rotation/balance.py",
        "eye = torch.eye(BLOCK_SIZE, dtype=torch.float64, device=moment.device)",
        "eye = torch.eye(BLOCK_SIZE, dtype=torch.float64)",
        f"{PLACEMENT_TESTS}::test_blocks_are_quantized_where_the_device_says",
    ),
    Mutation(
        "methods: scales of a plan imply a device",
        "duqpp/methods/group.py",
        "scales = torch.ones(first.shape[1], dtype=torch.float64, device=first.device)",
        "scales = torch.ones(first.shape[1], dtype=torch.float64)",
        f"{PLACEMENT_TESTS}::test_blocks_are_quantized_where_the_device_says",
    ),
    Mutation(
        "job: activations rest on a device without room",
        DEVICES,
        "compute if has_room(needed(), free) else HOST",
        "compute",
        f"{PLACEMENT_TESTS}::test_activations_rest_on_the_device_if_it_has_room",
    ),
    Mutation(
        "group: a wide weight is left with its first rows",
        GROUP,
        "for part in weight.split(_rows_at_a_time(weight))]",
        "for part in weight.split(_rows_at_a_time(weight))[:1]]",
        GROUP_TESTS,
    ),
    Mutation(
        "group: parts of a wide weight are reported against its first outputs",
        GROUP,
        "own = slice(done, done := done + len(weight))",
        "own = slice(done, len(weight))",
        GROUP_TESTS,
    ),
    Mutation(
        "group: refinement starts from uncompensated weights",
        GROUP,
        "latent = ranks.gather(made.compensated)",
        "latent = exact",
        f"{GROUP_TESTS} {SEQUENTIAL_TESTS} {REFINE_BLOCKS_TESTS}",
    ),
    Mutation(
        "independent: smoothing is left out of the statistics' samples",
        INDEPENDENT,
        "x = self.samples / self.scales.float()",
        "x = self.samples.clone()",
        INDEPENDENT_TESTS,
    ),
    Mutation(
        "independent: Hessians of rounded inputs are of inputs as they are",
        INDEPENDENT,
        "products.update(rounded, rounded)",
        "products.update(rotated, rotated)",
        INDEPENDENT_TESTS,
    ),
    Mutation(
        "independent: the block with smoothed producers keeps its weights",
        INDEPENDENT,
        "linear.weight.data = weight.to(linear.weight.dtype)",
        "pass",
        INDEPENDENT_TESTS,
    ),
    Mutation(
        "independent: a matrix times its scales, not divided by them",
        INDEPENDENT,
        "return matrix / scales.view(-1, BLOCK_SIZE, 1)",
        "return matrix * scales.view(-1, BLOCK_SIZE, 1)",
        INDEPENDENT_TESTS,
    ),
    Mutation(
        "smoothing: producers before consumers",
        METHOD_SMOOTHING,
        "for plan in reversed(list(plans.values())):",
        "for plan in list(plans.values()):",
        INDEPENDENT_TESTS,
    ),
    Mutation(
        "smoothing: a group of which some linears stay is smoothed",
        METHOD_SMOOTHING,
        "if group.producer is None or not group.is_whole:",
        "if group.producer is None:",
        f"{INDEPENDENT_TESTS} {JOB_TESTS}",
    ),
    Mutation(
        "family: query heads that share a value head are not told apart",
        FAMILY,
        "repeats=config.num_attention_heads // config.num_key_value_heads,",
        "repeats=1,",
        FAMILY_TESTS,
    ),
    Mutation(
        "family: a producer's bias keeps its scale",
        FAMILY,
        "bias.data = _divided(bias, divisor)",
        "bias.data = _divided(bias, torch.ones_like(divisor))",
        FAMILY_TESTS,
    ),
    Mutation(
        "family: other rows of a fused producer divided",
        FAMILY,
        "divisor[rows] = scales",
        "divisor[: len(scales)] = scales",
        FAMILY_TESTS,
    ),
    Mutation(
        "family: a norm divided by scales that it cannot hold",
        FAMILY,
        "scales = representable(scales, weight)",
        "scales = scales.clone()",
        INDEPENDENT_TESTS,
    ),
    Mutation(
        "family: a group without a skipped linear is whole",
        FAMILY,
        "is_whole=kept == group.linears",
        "is_whole=True",
        FAMILY_TESTS,
    ),
    Mutation(
        "family: every block has the groups of the first",
        FAMILY,
        "self.groups(int(index)) if",
        "self.groups(0) if",
        FAMILY_TESTS,
    ),
    Mutation(
        "family: the whole of a stored tensor in the place of a part",
        STACK,
        "source.tensor(stored.name)[stored.part]",
        "source.tensor(stored.name)",
        FAMILY_TESTS,
    ),
    Mutation(
        "weights: an index before a single file",
        WEIGHTS,
        "(_SINGLE, _INDEX) if",
        "(_INDEX, _SINGLE) if",
        WEIGHTS_TESTS,
    ),
    Mutation(
        "weights: of two tensors for one, the last",
        WEIGHTS,
        "found.setdefault(renamed, stored[name])",
        "found[renamed] = stored[name]",
        WEIGHTS_TESTS,
    ),
    Mutation(
        "weights: a head compared before the cast",
        WEIGHTS,
        "torch.equal(left[rows].to(self.dtype), right[rows].to(self.dtype))",
        "torch.equal(left[rows].double(), right[rows].double())",
        WEIGHTS_TESTS,
    ),
    Mutation(
        "weights: a head does not stand for the embedding",
        WEIGHTS,
        "if source not in found and target in found:",
        "if False:",
        WEIGHTS_TESTS,
    ),
    Mutation(
        "weights: a name is converted that needs not be",
        WEIGHTS,
        "if renamed not in names and name in names:",
        "if False:",
        WEIGHTS_TESTS,
    ),
    Mutation(
        "weights: the dtype of an index is not asked",
        WEIGHTS,
        'if dtype is None and "dtype" in metadata:',
        "if False:",
        WEIGHTS_TESTS,
    ),
    Mutation(
        "positions: those of before the extension are not asked",
        POSITIONS,
        'rope.get("original_max_position_embeddings") or own',
        "own",
        POSITIONS_TESTS,
    ),
    Mutation(
        "family: the width of what is skipped",
        FAMILY,
        "self.quantized_groups(index, skip)}",
        "self.groups(index)}",
        FAMILY_TESTS,
    ),
    Mutation(
        "random: one matrix for all blocks",
        FIXED,
        "count = group.blocks if self.per_block else None",
        "count = None",
        INDEPENDENT_TESTS,
    ),
    Mutation(
        "options: drift with GPTQ turned off",
        OPTIONS,
        '            values["drift"] = 0.0',
        '            values["drift"] = values["drift"]',
        "tests/test_config.py",
    ),
    Mutation(
        "options: refinement starts from GPTQ",
        OPTIONS,
        'values |= {"gptq": False, "block_order": "channels", "drift": 0.0}',
        'values |= {"block_order": "channels", "drift": 0.0}',
        "tests/test_config.py",
    ),
    Mutation(
        "duqpp: drift is the float model's inputs themselves",
        SEQUENTIAL,
        "change = plan.transform.apply(exact_rows.to(device).float()).sub_(rotated)",
        "change = plan.transform.apply(exact_rows.to(device).float())",
        SEQUENTIAL_TESTS,
    ),
    Mutation(
        "hessian: sums, not means, over tokens",
        HESSIAN,
        "mul_(2.0 / self.tokens)",
        "mul_(2.0)",
        HESSIAN_TESTS,
    ),
    Mutation(
        "hessian: the products of the last batch alone",
        HESSIAN,
        "self._sum[rows, columns] += x[:, rows].T @ y[:, columns]",
        "self._sum[rows, columns] = (x[:, rows].T @ y[:, columns]).double()",
        HESSIAN_TESTS,
    ),
    Mutation(
        "learned: rounded weights are not rotated",
        LEARNED,
        "weight = rotate_blocks(linear.weight.detach().float(), self.rotation())",
        "weight = linear.weight.detach().float()",
        LEARNED_TESTS,
    ),
    Mutation(
        "learned: the block keeps its stand-ins",
        LEARNED,
        "        module.set_submodule(name, linear)\n    return start",
        "        pass\n    return start",
        LEARNED_TESTS,
    ),
    Mutation(
        "latent: an input is kept after its last reader",
        LATENT,
        "if self._reads == self._readers:",
        "if self._reads > self._readers:",
        LATENT_TESTS,
    ),
    Mutation(
        "shared input: one that was changed in place is taken for what it was",
        SHARED_INPUT,
        " and self.version == version",
        "",
        SHARED_INPUT_TESTS,
    ),
    Mutation(
        "shared input: another tensor is taken for the one that was read",
        SHARED_INPUT,
        "self.source is source and ",
        "",
        SHARED_INPUT_TESTS,
    ),
    Mutation(
        "shared input: it is remembered after its owner has run",
        SHARED_INPUT,
        "        self._reads.pop(_thread(), None)",
        "        pass",
        SHARED_INPUT_TESTS,
    ),
    Mutation(
        "prepared: a weight that took the place of a prepared one is taken for one",
        PREPARED,
        "        if _bytes_at(marked, places) != self._marks:",
        "        if False:",
        MODULE_TESTS,
    ),
    Mutation(
        "prepared: one that was moved as it is is taken for row-major",
        PREPARED,
        "        self.remember(codes)\n        return True",
        "        return False",
        MODULE_TESTS,
    ),
    Mutation(
        "direct call: a gradient that is asked for is forgotten",
        LINEAR,
        "            if not runs_directly(x, bias):\n                return None\n",
        "",
        DIRECT_CALL_TESTS,
    ),
    Mutation(
        "direct call: what is no longer the prepared weight is multiplied",
        PREPARED,
        "if self._is_known(codes) or self.holds(codes, scales):",
        "if True:",
        DIRECT_CALL_TESTS,
    ),
    Mutation(
        "direct call: DuQuant's first rotation and permutation are left out",
        LINEAR,
        "            x = self._transform(x)\n",
        "            pass\n",
        DIRECT_CALL_TESTS,
    ),
    Mutation(
        "direct call: what the op refuses is the caller's error",
        LINEAR,
        "except (KeyError, RuntimeError):",
        "except KeyError:",
        DIRECT_CALL_TESTS,
    ),
    Mutation(
        "linear: once loaded, it orders its weight anew in every call",
        LINEAR,
        "        super()._load_from_state_dict(*args, **kwargs)\n        if was_prepared:\n",
        "        super()._load_from_state_dict(*args, **kwargs)\n        if False:\n",
        DIRECT_CALL_TESTS,
    ),
    Mutation(
        "joined: a bias that came later is left out",
        LINEAR,
        "joined = shared.joined if bias is None and not",
        "joined = shared.joined if not",
        JOINED_TESTS,
    ),
    Mutation(
        "joined: two calls of a linear return one memory",
        SHARED_INPUT,
        "y: Tensor = last.made.pop(first)",
        "y: Tensor = last.made[first]",
        JOINED_TESTS,
    ),
    Mutation(
        "joined: a product serves every input",
        SHARED_INPUT,
        "        return self.source is source and self.version == version and self.by == by",
        "        return self.by == by",
        JOINED_TESTS,
    ),
    Mutation(
        "joined: a weight that is elsewhere is taken for its slice",
        "duqpp/nn/joined.py",
        "self._firsts.get((codes.data_ptr(), scales.data_ptr()))",
        "sum(self._rows[: self._rows.index(len(codes))])",
        JOINED_TESTS,
    ),
    Mutation(
        "joined: rows that fill no tile are joined",
        LINEAR,
        "if ops is None or not ops.whole_rows or self.out_features % ops.whole_rows:",
        "if ops is None or not ops.whole_rows:",
        JOINED_TESTS,
    ),
    Mutation(
        "saving: the configuration says that a head of its own is tied",
        SAVING,
        "        model.config.tie_word_embeddings = tied\n",
        "",
        EDITS_TESTS,
    ),
    Mutation(
        "saving: a part in another dtype is cast in silence",
        SAVING,
        "not is_transform and tensor.dtype != model.dtype",
        "False",
        EDITS_TESTS,
    ),
    Mutation(
        "saving: the model's own state in the place of one that was given",
        SAVING,
        "state = dict(model.state_dict() if given is None else given)",
        "state = dict(model.state_dict())",
        EDITS_TESTS,
    ),
    Mutation(
        "transforms: the linears of a group may differ",
        TRANSFORMS,
        "if other in present and not torch.equal(read(other), expected):",
        "if False:",
        MODULE_TESTS,
    ),
    Mutation(
        "linear: offloaded by accelerate, a row-major weight is taken for a prepared one",
        LINEAR,
        'if name == "_hf_hook" and self.weight_packed.is_meta:',
        'if name == "_hf_hook" and False:',
        MODULE_TESTS,
    ),
    Mutation(
        "refine: a block's loss is not relative",
        REFINE_BLOCKS,
        "error = (out - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-30)",
        "error = (out - target).square().sum(-1)",
        REFINE_BLOCKS_TESTS,
    ),
    Mutation(
        "refine: the last state is kept, not the best",
        REFINE_BLOCKS,
        "quantize(w, rule=rule) for n, w in stopping.best.items()",
        "quantize(w.detach(), rule=rule) for n, w in parameters.items()",
        REFINE_BLOCKS_TESTS,
    ),
    Mutation(
        "distill: the gradient of the reversed divergence",
        DISTILL,
        "gradient -= head(other).float().softmax(-1)",
        "gradient = head(other).float().softmax(-1) - gradient",
        DISTILL_TESTS,
    ),
    Mutation(
        "distill: a rank that has no sequence counts as the others do",
        DISTILL,
        "return _Part(hidden[rows].to(compute), arguments, model.exact[batch][rows], share)",
        "return _Part(hidden[rows].to(compute), arguments, model.exact[batch][rows], "
        "len(hidden[rows]) / sequences)",
        DISTILL_TESTS,
    ),
    Mutation(
        "distill: each rank takes its own divergence for that of all",
        DISTILL,
        "return sum(model.ranks.all(own * part.share))",
        "return own",
        DISTILL_TESTS,
    ),
    Mutation(
        "distill: ranks take a part of the gradient",
        DISTILL,
        "gradient * (part.share * model.ranks.count)",
        "gradient * part.share",
        DISTILL_TESTS,
    ),
    Mutation(
        "latent model: products are made again",
        LATENT_MODEL,
        "if x.device.type == HOST.type:",
        "if x.device.type != HOST.type:",
        DISTILL_TESTS,
    ),
    Mutation(
        "latent model: gradients stay",
        LATENT_MODEL,
        "own.grad, latent.grad = self._local(latent.grad), None",
        "own.grad = self._local(latent.grad)",
        DISTILL_TESTS,
    ),
    Mutation(
        "latent model: a rank goes on from rows that are another's",
        LATENT_MODEL,
        "rows * self._ranks.index : rows * (self._ranks.index + 1)",
        ": rows",
        DISTILL_TESTS,
    ),
    Mutation(
        "training state: checks that were worse are forgotten",
        TRAINING_STATE,
        "optimizer.done, stopping.stale, stopping.least = saved",
        "optimizer.done, _, stopping.least = saved",
        DISTILL_TESTS,
    ),
    Mutation(
        "training state: the best loss is forgotten",
        TRAINING_STATE,
        "optimizer.done, stopping.stale, stopping.least = saved",
        "optimizer.done, stopping.stale, _ = saved",
        DISTILL_TESTS,
    ),
    Mutation(
        "training state: one whose blocks are not all there is taken",
        TRAINING_STATE,
        "if not all(self._of_block(steps, index).exists() for index in self._latents.rows):",
        "if False:",
        DISTILL_TESTS,
    ),
    Mutation(
        "training state: an earlier one is not removed",
        TRAINING_STATE,
        "            if file not in kept:\n                file.unlink()\n",
        "            pass\n",
        DISTILL_TESTS,
    ),
    # Jobs.
    Mutation(
        "job: the token behind the vocabulary passes",
        JOB_CALIBRATION,
        "most >= model_config.vocab_size",
        "most > model_config.vocab_size",
        f"{JOB_TESTS}::test_calibration_tokens_are_of_the_vocabulary",
    ),
    Mutation(
        "job: the first sequences calibrate",
        JOB_CALIBRATION,
        "chosen = places.round().long()",
        "chosen = torch.arange(count, device=HOST)",
        JOB_TESTS,
    ),
    Mutation(
        "job: a finished block without its report counts",
        JOB_BLOCKS,
        '[".safetensors", ".json", *',
        '[".safetensors", *',
        f"{RESUME_TESTS}::test_a_damaged_file_is_removed_and_made_again_as_the_line_says",
    ),
    Mutation(
        "job: a shard before its report",
        JOB_BLOCKS,
        "        files = [shard]\n",
        "        files = [shard]\n        write_shard(shard, kept.tensors)\n",
        f"{RESUME_TESTS}::test_full_disk_keeps_what_is_finished",
    ),
    Mutation(
        "job: resumed behind the float block",
        JOB,
        'config.next_inputs == "float"',
        'config.next_inputs == "quantized"',
        f"{RESUME_TESTS}::test_resume_gives_the_same_bytes",
    ),
    Mutation(
        "job: two blocks are read ahead",
        JOB_OVERLAP,
        "if len(coming) > 1:",
        "if len(coming) > 2:",
        f"{JOB_TESTS}::test_one_decoder_block_is_worked_on_one_read_and_one_written",
    ),
    Mutation(
        "job: what the last write raises is lost",
        JOB_OVERLAP,
        "        yield later\n        while calls:\n            calls.popleft().result()\n",
        "        yield later\n",
        f"{RESUME_TESTS}::test_full_disk_keeps_what_is_finished",
    ),
    Mutation(
        "job: another thread computes with a team of its own",
        JOB_OVERLAP,
        "        with single_thread():\n"
        "            executor.submit(torch.get_num_threads).result()\n",
        "",
        "tests/job/test_overlap.py",
    ),
    Mutation(
        "job: the order of tokens is no part of the job",
        JOB_FOLDER,
        "data.update(tokens.numpy().tobytes())",
        "data.update(tokens.sort(-1).values.numpy().tobytes())",
        f"{RESUME_TESTS}::test_refuses_another_job",
    ),
    Mutation(
        "job: the shape of tokens is no part of the job",
        JOB_FOLDER,
        '        data.update(f"{list(tokens.shape)}".encode())\n',
        "",
        f"{RESUME_TESTS}::test_the_shape_of_tokens_is_part_of_the_job",
    ),
    Mutation(
        "job: a link to nothing is taken for a free output",
        JOB_FOLDER,
        "if out.is_symlink() or out.exists():",
        "if out.exists():",
        "tests/cli/test_bad_input.py",
    ),
    Mutation(
        "job: shards that were trained once stay behind a new one",
        JOB_DISTILLATION,
        "    for shard in folder.shards:\n        shard.unlink(missing_ok=True)\n",
        "",
        f"{RESUME_TESTS}::test_a_file_damaged_after_distillation_is_made_again",
    ),
    # Evaluation.
    Mutation(
        "perplexity: every token predicts itself",
        PERPLEXITY,
        "_sums(head, hidden, window[1:], against)",
        "_sums(head, hidden, window[:-1], against)",
        PERPLEXITY_TESTS,
    ),
    Mutation(
        "perplexity: a window's mean is over all its tokens",
        PERPLEXITY,
        "total / (seq_len - 1) for total in",
        "total / seq_len for total in",
        PERPLEXITY_TESTS,
    ),
    Mutation(
        "perplexity: the token behind the vocabulary passes",
        PERPLEXITY,
        "most >= model.config.vocab_size",
        "most > model.config.vocab_size",
        PERPLEXITY_TESTS,
    ),
    Mutation(
        "perplexity: the targets stay on the host",
        PERPLEXITY,
        "targets[part].to(logits.device)",
        "targets[part]",
        f"{STREAMING_TESTS}::test_a_stack_computes_where_its_placement_says",
    ),
    Mutation(
        "streaming: the stack keeps the blocks that it gives away",
        STACK,
        "copy.deepcopy(self._blocks[index]).eval()",
        "self._blocks[index].eval()",
        f"{STREAMING_TESTS}::test_memory_does_not_grow_with_the_number_of_blocks",
    ),
    Mutation(
        "streaming: several windows at a time",
        FINAL_STATES,
        "first_inputs(windows, batch=1, ",
        "first_inputs(windows, ",
        f"{STREAMING_TESTS}::test_streamed_results_are_those_of_the_whole_model",
    ),
    Mutation(
        "streaming: the head without the last norm",
        FINAL_STATES,
        "yield norm(hidden.to(inputs.placement.compute))[0]",
        "yield hidden.to(inputs.placement.compute)[0]",
        f"{STREAMING_TESTS}::test_streamed_results_are_those_of_the_whole_model",
    ),
    Mutation(
        "calibration: all sequences of one text before those of the next",
        "duqpp/calibration/text.py",
        "order = sorted(range(samples), key=places.__getitem__)",
        "order = list(range(samples))",
        "tests/calibration/test_text.py::test_each_source_has_its_share_spread_over_all",
    ),
    Mutation(
        "calibration: a text that has too little is not counted",
        "duqpp/calibration/text.py",
        "if all(n <= most for n, most",
        "if any(n <= most for n, most",
        "tests/calibration/test_text.py::test_as_many_as_the_shortest_source_allows",
    ),
    Mutation(
        "evaluation: lm_head alone for the logits of any family",
        "duqpp/evaluation/head.py",
        "return cls(model.get_output_embeddings(), logits)",
        "return cls(model.get_output_embeddings())",
        "tests/evaluation/test_perplexity.py::test_perplexity_of_any_family_by_definition",
    ),
    Mutation(
        "streaming: a model that others quantized is read as a float one",
        "duqpp/evaluation/models.py",
        'and not values.get("quantization_config")',
        "",
        f"{STREAMING_TESTS}::test_what_cannot_stream_is_loaded_whole",
    ),
    Mutation(
        "checkpoint: norms stay in the dtype that they are stored in",
        "duqpp/checkpoint/stack.py",
        "return tensor if is_exact(name, self._expected[name]) else tensor.to(self.config.dtype)",
        "return tensor",
        f"{STREAMING_TESTS}::test_norms_in_another_dtype_are_cast_as_transformers_does",
    ),
    Mutation(
        "divergence: reference and model swapped",
        PERPLEXITY,
        "kl_and_agreement(there, logits)",
        "kl_and_agreement(logits, there)",
        DIVERGENCE_TESTS,
    ),
    Mutation(
        "divergence: other tokens pass",
        DIVERGENCE,
        "if not torch.equal(self.tokens, tokens):",
        "if self.tokens.shape != tokens.shape:",
        DIVERGENCE_TESTS,
    ),
    Mutation(
        "scores: the deviation of a population",
        SCORES,
        "statistics.stdev(map(value, runs))",
        "statistics.pstdev(map(value, runs))",
        f"{COMPARE_TESTS}::test_a_row_says_what_its_runs_say",
    ),
    Mutation(
        "compare: every method runs once per seed",
        COMPARE,
        "for seed in (self.seeds if config.needs.seed else self.seeds[:1])",
        "for seed in self.seeds",
        f"{COMPARE_TESTS}::test_only_methods_with_randomness_run_once_per_seed",
    ),
    Mutation(
        "compare: each seed's model is kept in one folder",
        COMPARE,
        "self.keep.get(name) if seed == self.seeds[0] else None",
        "self.keep.get(name)",
        f"{COMPARE_TESTS}::test_kept_models_stay_and_load",
    ),
    Mutation(
        "compare: a model that is gone is taken for evaluated",
        COMPARE_FOLDER,
        "if file.exists() and model.exists():",
        "if file.exists():",
        f"{COMPARE_TESTS}::test_a_model_that_was_removed_before_its_evaluation_is_made_again",
    ),
    Mutation(
        "compare: the calibration text is no part of a run",
        COMPARE_FOLDER,
        'self._calibration if config.needs.inputs else ""',
        '""',
        f"{COMPARE_TESTS}::test_another_calibration_text_is_another_run",
    ),
    Mutation(
        "standing in: every batch gets the first one's outputs",
        STANDING,
        "self._known.outputs[next(self._calls)]",
        "self._known.outputs[0]",
        SEQUENTIAL_TESTS,
    ),
    Mutation(
        "standing in: the module does not come back",
        STANDING,
        "in replaced.items()",
        "in {}.items()",
        SEQUENTIAL_TESTS,
    ),
    Mutation(
        "duqpp: a block is run from its beginning for each group",
        SEQUENTIAL,
        "done.known[group.owner] = Known(outputs, group.returns)",
        "pass",
        SEQUENTIAL_TESTS,
    ),
    # Where the time goes.
    Mutation(
        "stages: a stage inside of another is counted twice",
        STAGES,
        "seconds - own.inside",
        "seconds",
        STAGES_TESTS,
    ),
    Mutation(
        "stages: another thread's time is taken off the job's",
        STAGES,
        "if outer.thread == thread:",
        "if outer:",
        STAGES_TESTS,
    ),
    Mutation(
        "stages: another thread's time is the job's",
        STAGES,
        "beside = threading.get_ident() != self._thread",
        "beside = False",
        STAGES_TESTS,
    ),
    Mutation(
        "stages: a stage belongs to no block unless it names one",
        STAGES,
        "outer.block if block is None else block",
        "block",
        STAGES_TESTS,
    ),
    Mutation(
        "job: the stages of a block have no number",
        JOB,
        'with stage("other", index), ',
        'with stage("other"), ',
        STAGES_TESTS,
    ),
    # The command.
    Mutation(
        "cli: --no-gptq for gptq=True",
        CLI_OPTIONS,
        'flags[name][0 if value == "True" else -1]',
        'flags[name][-1 if value == "True" else 0]',
        OPTIONS_TESTS,
    ),
    Mutation(
        "cli: a method named twice",
        CLI_OPTIONS,
        "        if spec in configs:",
        "        if not spec:",
        OPTIONS_TESTS,
    ),
    Mutation(
        "cli: defaults of a spec hide those of the command",
        CLI_OPTIONS,
        'if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"',
        "if value is not None",
        OPTIONS_TESTS,
    ),
    Mutation(
        "cli: kilobytes of 1024 bytes",
        TABLES,
        '("kB", 10**3)',
        '("kB", 2**10)',
        TABLES_TESTS,
    ),
    Mutation(
        "cli: the spread of the agreement is not in percent",
        TABLES,
        "None if spread is None else 100 * spread, 1",
        "spread, 1",
        TABLES_TESTS,
    ),
    Mutation(
        "cli: a line at every step of a log",
        PROGRESS,
        "self._is_long, wait = True, INTERVAL",
        "self._is_long, wait = True, PATIENCE",
        PROGRESS_TESTS,
    ),
    Mutation(
        "cli: a stage that an error ends is done",
        PROGRESS,
        "if self._is_long and finished:",
        "if self._is_long:",
        PROGRESS_TESTS,
    ),
    # Plans.
    Mutation(
        "plan: sampled inputs are counted three times",
        COSTS,
        'kept = _weights_of(groups) | {"sampled inputs": sum(samples)}',
        'kept = _weights_of(groups) | {"sampled inputs": 3 * sum(samples)}',
        "tests/job/test_plan.py",
    ),
    Mutation(
        "plan: moments are held in float32",
        COSTS,
        '{"second moments, float64": _FLOAT64 * squares}',
        '{"second moments, float64": _FLOAT32 * squares}',
        "tests/job/test_plan.py",
    ),
    Mutation(
        "plan: a state of the training takes the place of the one before",
        JOB_PLAN,
        "states = min(2, trained.saves) * trained.state",
        "states = min(1, trained.saves) * trained.state",
        "tests/job/test_plan.py",
    ),
    Mutation(
        "plan: attention takes no operations",
        SHAPES,
        "count: int = sdpa_flop_count(q, k, v)",
        "count = 0",
        "tests/job/test_plan.py",
    ),
    Mutation(
        "plan: all ranks have all sequences",
        JOB_PLAN,
        "own, others = -(-batches // ranks), -(-refining // ranks)",
        "own, others = batches, refining",
        "tests/job/test_plan.py",
    ),
    Mutation(
        "plan: activations rest on the device, room or not",
        JOB_PLAN,
        "memory is None or has_room(self.all_on_device(), memory)",
        "memory is None or True",
        "tests/job/test_plan.py",
    ),
)

"""The table that chooses a kernel of mxfp4_gemm: its choices, splits and workspaces."""

import pytest

from duqpp.format.scale_layout import swizzled_size
from tests.cpp.test_rotate_quantize_programs import run_program
from tests.cuda.library import extension

B200_SMS = 148
LONG = {
    "A": "sm100_swapped_128x64",
    "D": "sm100_256x128",
    "E": "sm100_256x192",
    "F": "sm100_256x256",
}
STREAMK = "sm100_swapped_128x64_streamk"

# Rows of x: 1, 64, 65, 128, 129, 256, 257, 512, 768, 1024, 2048, 8192. B2 is stream-K in two parts.
ROWS = (1, 64, 65, 128, 129, 256, 257, 512, 768, 1024, 2048, 8192)
CHOICES = {
    "1B k": (512, 2048, "B4 B4 B4 B4 B4 B4 B4 B4 B3 B2 D F"),
    "8B k": (1024, 4096, "B4 B4 B4 B4 B4 B4 B3 B2 D D D F"),
    "8B qkv": (6144, 4096, "B3 B3 D D D D E E F E F F"),
    "8B o": (4096, 4096, "B4 B4 B2 B2 D D D D E F F F"),
    "8B gate_up": (28672, 4096, "A A F F F F F F F F F F"),
    "8B down": (4096, 14336, "B4 B4 B2 B2 D D D D E F F F"),
    "70B qkv": (10240, 8192, "A A E E E E E E F E F F"),
    "70B o": (8192, 8192, "B2 B2 D D D D F F E F F F"),
    "70B gate_up": (57344, 8192, "A A F F F F F F F F F F"),
    "70B down": (8192, 28672, "B2 B2 D D D D F F E F F F"),
}


@pytest.mark.parametrize("linear", CHOICES)
def test_llama_3_linears_on_a_b200(linear):
    N, K, expected = CHOICES[linear]
    chosen = []
    for M in ROWS:
        plan = extension().select_gemm(M, N, K, arch=100, sm_count=B200_SMS)
        letter = {name: letter for letter, name in LONG.items()}.get(plan.kernel)
        chosen.append(f"B{plan.splits}" if plan.kernel == STREAMK else letter)
    assert " ".join(chosen) == expected


@pytest.mark.parametrize("arch", [100, 103])
@pytest.mark.parametrize("sm_count", [1, 2, 20, 74, 132, 148, 160])
def test_splits_use_idle_sms_and_leave_each_a_share_of_k(arch, sm_count):
    split = 0
    for M in (1, 8, 63, 64, 65, 127, 128, 129, 1000):
        for N in (8, 128, 1024, 4096, 4104, 9472, 28672):
            for K in (32, 256, 1024, 1792, 2048, 4096, 14336, 28672):
                plan = extension().select_gemm(M, N, K, arch=arch, sm_count=sm_count)
                assert plan.sm_count == sm_count
                if plan.kernel != STREAMK:
                    assert plan.splits == 1
                    continue
                split += 1
                tiles = -(-N // 128) * -(-M // 64)
                assert 2 <= plan.splits <= 4
                assert tiles * plan.splits <= sm_count
                assert 2 * plan.splits <= -(-K // 256)
    assert (split > 0) == (sm_count > 1)


def test_stream_k_has_an_off_switch():
    select = extension().select_gemm
    shape, gpu = (1, 4096, 4096), {"arch": 100, "sm_count": B200_SMS}
    assert select(*shape, **gpu).kernel == STREAMK
    assert extension().allow_streamk(False)
    try:
        off = select(*shape, **gpu)
        assert (off.kernel, off.splits) == (LONG["A"], 1)
        assert select(*shape, **gpu, streamk=True).kernel == STREAMK
        assert select(65, 4096, 4096, **gpu).kernel == LONG["D"]
    finally:
        assert not extension().allow_streamk(True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("off", "off"),
        ("on", "on"),
        ("", "DUQPP_STREAMK must be on or off, got "),
        ("0", "DUQPP_STREAMK must be on or off, got 0"),
        (None, "on"),
    ],
)
def test_the_switch_is_what_the_environment_says(value, expected, monkeypatch):
    if value is None:
        monkeypatch.delenv("DUQPP_STREAMK", raising=False)
    else:
        monkeypatch.setenv("DUQPP_STREAMK", value)
    assert run_program("print_streamk_switch") == expected


def test_workspace_of_stream_k_is_a_float32_tile_and_a_barrier_for_each_tile():
    module = extension()
    workspace = module.gemm_workspace_size
    for splits in (2, 3, 4):
        plan = module.GemmPlan(STREAMK, splits=splits, sm_count=B200_SMS)
        assert workspace(plan, 8, 4096) == 32 * 128 * 64 * 4 + 32 * 4 == 1_048_704
        assert workspace(plan, 65, 136) == 4 * 128 * 64 * 4 + 128
        assert workspace(plan, 1, 8) == 128 * 64 * 4 + 128  # barriers in L2 lines
    for name in LONG.values():
        assert workspace(module.GemmPlan(name, sm_count=B200_SMS), 8192, 28672) == 0


@pytest.mark.parametrize(("n", "k"), [(8, 32), (136, 96), (4096, 4128)])
def test_scales_of_a_weight_are_swizzled_or_in_fragment_order(n, k):
    size = extension().weight_scales_size
    for arch in (80, 86, 89, 90):
        assert size(n, k, arch=arch) == n * k // 32 + n  # and a byte for each row
    for arch in (100, 103, 120, 121):
        assert size(n, k, arch=arch) == swizzled_size(n, k // 32) > n * k // 32


def test_a_chosen_workspace_stays_small():
    module = extension()
    for sm_count in (20, 148, 160):
        for M in (1, 64, 128, 129, 8192):
            for N in range(8, 30000, 1000):
                plan = module.select_gemm(M, N, 8192, arch=100, sm_count=sm_count)
                # At most a tile of 32 KiB for every two SMs.
                assert module.gemm_workspace_size(plan, M, N) <= sm_count // 2 * 32896


@pytest.mark.parametrize("arch", [120, 121])
def test_one_kernel_serves_sm_120(arch):
    for M, N, K in [(1, 4096, 4096), (64, 8, 32), (8192, 28672, 8192)]:
        plan = extension().select_gemm(M, N, K, arch=arch, sm_count=170)
        assert (plan.kernel, plan.splits) == ("sm120_128x128", 1)


@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_older_gpus_have_as_many_columns_as_rows_of_x_and_ctas_for_their_sms(arch):
    def chosen(M: int, N: int) -> str:
        plan = extension().select_gemm(M, N, 4096, arch=arch, sm_count=132)
        assert plan.splits == 1
        assert extension().gemm_workspace_size(plan, M, N) == 0
        return plan.kernel.removeprefix("sm80_")

    assert [chosen(m, 4096) for m in (1, 8, 9, 16)] == ["32x8", "32x8", "32x16", "32x16"]
    assert [chosen(m, 4096) for m in (17, 32, 33, 64, 65, 8192)] == ["32x32"] * 6
    # 132 SMs take 132 CTAs a round; a CTA takes as long as its rows of W and ten more.
    ends = {2112: "16x8", 4224: "32x8", 8448: "64x8", 12672: "32x8", 16896: "64x8", 21120: "32x8"}
    for end, kernel in ends.items():
        assert [chosen(8, end - 8), chosen(8, end)] == [kernel] * 2
    assert [chosen(8, n) for n in (8, 28672, 57344)] == ["16x8", "32x8", "64x8"]
    assert [chosen(16, n) for n in (1024, 4096, 8192)] == ["16x16", "32x16", "64x16"]


KERNELS_SM80 = ("16x8", "32x8", "64x8", "16x16", "32x16", "64x16", "32x32")


@pytest.mark.parametrize(("arch", "most"), [(80, 163), (86, 99), (87, 163), (89, 99), (90, 227)])
@pytest.mark.parametrize("kernel", KERNELS_SM80)
def test_rounds_take_every_segment_once_and_their_ctas_fit(kernel, arch, most):
    module = extension()
    plan = module.GemmPlan(f"sm80_{kernel}", sm_count=132)
    for k in (32, 512, 544, 4096, 8192, 14336, 28672, 53248):
        launch = module.gemm_sm80_launch(plan, 1, 4096, k, arch=arch)
        assert launch["segments"] == -(-k // 512)
        assert launch["warps"] * launch["rounds"] >= launch["segments"]
        assert launch["warps"] * (launch["rounds"] - 1) < launch["segments"]
        assert 1 <= launch["warps"] <= 16
        assert launch["shared_memory"] <= most * 1024


@pytest.mark.parametrize("kernel", KERNELS_SM80)
def test_a_gpu_with_less_shared_memory_has_fewer_warps_in_a_cta(kernel):
    module = extension()
    plan = module.GemmPlan(f"sm80_{kernel}", sm_count=132)
    warps = [
        module.gemm_sm80_launch(plan, 1, 4096, 8192, arch=arch)["warps"] for arch in (86, 80, 90)
    ]
    assert warps == sorted(warps) and warps[0] > 4
    assert warps[2] == (8 if kernel in ("64x16", "32x32") else 16)


@pytest.mark.parametrize("arch", [75, 110, 130])
def test_other_architectures_have_no_kernel_here(arch):
    assert extension().select_gemm(16, 4096, 4096, arch=arch, sm_count=132) is None


def test_an_unknown_kernel_is_refused_by_name():
    with pytest.raises(ValueError, match="no kernel is named 'sm99'"):
        extension().GemmPlan("sm99", sm_count=1)

"""What the CUDA compiler makes of the kernels: the instructions that were meant, and no spills."""

from __future__ import annotations

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from registry import package
from test_cubin import WHEELS as NVRTC

from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import Region, Step
from qcompiler.targets import cuda
from qcompiler.targets.cubin import CubinCompiler, find_cubin_compiler
from qcompiler.targets.cuda.machine_code import (
    blocks_per_multiprocessor,
    compile_kernels,
    find_cuobjdump,
)
from qcompiler.targets.cuda.packing import CONVS

WHEELS = ("nvidia-cuda-cuobjdump==13.5.37", "nvidia-cuda-nvdisasm==13.5.37")
needs_cuobjdump = pytest.mark.usefixtures("listings")


@pytest.fixture(scope="module")
def compiler() -> CubinCompiler:
    """That of this machine, else NVRTC of the registry's."""
    try:
        return find_cubin_compiler()
    except ToolchainError:
        folders = [package(wheel) for wheel in NVRTC]
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(folder)
        return find_cubin_compiler()


@pytest.fixture(scope="module")
def cuobjdump(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """That of this machine, else the registry's; None without a network."""
    if (found := find_cuobjdump()) is not None:
        return found
    folder = tmp_path_factory.mktemp("bin")
    try:
        programs = [next(package(wheel).glob("nvidia/cu13/bin/*")) for wheel in WHEELS]
    except pytest.skip.Exception:
        return None
    for program in programs:
        shutil.copy(program, folder)
        (folder / program.name).chmod(0o755)
    return str(folder / "cuobjdump")


@pytest.fixture
def listings(cuobjdump: str | None) -> None:
    if cuobjdump is None:
        pytest.skip("no cuobjdump with nvdisasm, and none can be downloaded")


BIAS_GELU = {"extras": ("channel",), "steps": (Step("Add", (0, -1)), Step("Gelu", (1,)))}
SIZES = (("K", 4096), ("N", 4096))
REGIONS = {
    Region("QMatMulW4A16", (*SIZES, ("G", 128))): cuda.ARCHS,
    Region("QMatMulW4A16", (("K", 576), ("N", 1536), ("G", 32)), **BIAS_GELU): ("sm_80",),
    Region("QMatMulW8A8", SIZES, **BIAS_GELU): cuda.ARCHS,
    Region("QMatMulFp8", SIZES): ("sm_89", "sm_90a"),
    Region("Quantize", (("K", 4096),)): ("sm_80",),
    Region("QuantizeFp8", (("K", 4096),)): ("sm_89",),
    Region(
        "AddLayerNorm",
        (("K", 4096),),
        ("channel",),
        outputs=("x", "y", "q", "s"),
        attributes=(("epsilon", 1e-5),),
        flags=("f16", "smoothed"),
    ): ("sm_80", "sm_90a"),
    Region(
        "AddRMSNormFp8",
        (("K", 576),),
        outputs=("x", "q", "s"),
        attributes=(("epsilon", 1e-5),),
        flags=("f16",),
    ): ("sm_89",),
}
CONV = Region(
    "QConvW8A8",
    (("K", 256), ("N", 256), ("R", 3), ("S", 3)),
    ("channel", "tensor"),
    (Step("Add", (0, -1)), Step("Add", (1, -2)), Step("Relu", (2,))),
    attributes=(("dilations", (1, 1)), ("group", 1), ("strides", (1, 1))),
)


def stored(channels: int, group: int, outputs: tuple[str, ...], **more: object) -> Region:
    """A convolution whose result is stored as an image."""
    pads = (0, 1, 1, 0, 0, 1, 1, 0)
    steps = (("dilations", (1, 1)), ("group", group), ("pads", pads), ("strides", (1, 1)))
    sizes = (("K", channels), ("N", channels), ("R", 3), ("S", 3))
    return Region("QConvImageW8A8", sizes, outputs=outputs, attributes=steps, **more)


BIAS_RELU = {"extras": ("channel",), "steps": (Step("Add", (0, -1)), Step("Relu", (1,)))}
CHAIN = stored(256, 1, ("made",), **BIAS_RELU)
BOTH = dataclasses.replace(CONV, anchor=CHAIN.anchor, attributes=CHAIN.attributes,
                           outputs=("y", "made"))  # fmt: skip
GROUPED = stored(256, 8, ("made",), **BIAS_RELU)
DEPTHWISE = stored(256, 256, ("made",), **BIAS_RELU)
IMAGE = Region("QuantizeImage", (("K", 256),), attributes=(("pads", (0, 1, 1, 0, 0, 1, 1, 0)),))
REGIONS |= {CONV: cuda.ARCHS, IMAGE: ("sm_80", "sm_90a"), CHAIN: cuda.ARCHS}
REGIONS |= {BOTH: ("sm_90a",), GROUPED: ("sm_80", "sm_90a"), DEPTHWISE: ("sm_80", "sm_90a")}
ALL = [(region, arch) for region, archs in REGIONS.items() for arch in archs]
WITH_COLUMNS = [(region, arch) for region, arch in ALL if "N" in dict(region.sizes)]
PRODUCTS = [(region, arch) for region, arch in WITH_COLUMNS if region != DEPTHWISE]
PLANNED_BLOCKS = {"stream": 3, "tile": 1, "roles": 1, "channels": 5}
"""Per multiprocessor, at the least."""


def names(parameters):
    return [f"{region.name}-{arch}" for region, arch in parameters]


@pytest.fixture(scope="module")
def code(request, compiler, cuobjdump):
    """What the compiler makes of a region; of all that tests here ask for, two at once."""
    pool, found = ThreadPoolExecutor(2), {}

    def ask(region, arch):
        if (region, arch) not in found:
            source = cuda.source(region, arch)  # by TVM, in this thread alone
            found[region, arch] = pool.submit(compile_kernels, source, arch, compiler, cuobjdump)
        return found[region, arch]

    given = [
        getattr(item, "callspec", None) for item in request.session.items
        if item.module is request.module
    ]  # fmt: skip
    for call in filter(None, given):
        if "region" in call.params:
            ask(call.params["region"], call.params["arch"])
    yield lambda region, arch: ask(region, arch).result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("region", "arch"), ALL, ids=names(ALL))
def test_no_register_is_spilled(region, arch, code):
    kernels = code(region, arch)
    expected = {launch.symbol for launch in cuda.launches(region, arch)}
    assert expected <= kernels.keys()
    assert all(kernel.spilled_bytes == kernel.stack_bytes == 0 for kernel in kernels.values())


@pytest.mark.parametrize(("region", "arch"), WITH_COLUMNS, ids=names(WITH_COLUMNS))
def test_as_many_blocks_fit_as_planned(region, arch, code):
    for launch in cuda.launches(region, arch):
        registers = code(region, arch)[launch.symbol].registers
        blocks = blocks_per_multiprocessor(arch, registers, launch.threads, launch.shared_bytes)
        kind = next(kind for kind in PLANNED_BLOCKS if f"_{kind}" in launch.symbol)
        assert blocks >= PLANNED_BLOCKS[kind], (launch.symbol, registers)


@needs_cuobjdump
@pytest.mark.parametrize(("region", "arch"), PRODUCTS, ids=names(PRODUCTS))
def test_tensor_cores_multiply(region, arch, code):
    # sm_90 has none for mma.sync of FP8: a few rows are widened to float16.
    fp8 = "HMMA.16816.F32" if arch == "sm_90a" else "QMMA.16832.F32.E4M3.E4M3"
    of_warp = {"QMatMulW4A16": "HMMA.16816.F32", "QMatMulW8A8": "IMMA.16832.S8.U8",
               **dict.fromkeys(CONVS, "IMMA.16832.S8.U8")}  # fmt: skip
    of_group = {"QMatMulW4A16": "HGMMA", "QMatMulW8A8": "IGMMA", "QMatMulFp8": "QGMMA",
                **dict.fromkeys(CONVS, "IGMMA")}  # fmt: skip
    kernels = code(region, arch)
    for launch in cuda.launches(region, arch):
        meant = of_warp.get(region.anchor, fp8)
        if arch == "sm_90a" and "_stream" not in launch.symbol:
            meant = of_group[region.anchor]
        assert kernels[launch.symbol].count(meant), launch.symbol


@needs_cuobjdump
@pytest.mark.parametrize(("region", "arch"), PRODUCTS, ids=names(PRODUCTS))
def test_weights_come_16_bytes_at_a_time(region, arch, code):
    kernels = code(region, arch)
    for launch in cuda.launches(region, arch):
        kernel = kernels[launch.symbol]
        if "_stream" in launch.symbol:
            assert kernel.count("LDG.E.NA.128", "LDG.E.128.NA")
            continue
        assert kernel.count("LDGSTS.E.BYPASS.128")
        assert kernel.count("LDGSTS") == kernel.count("LDGSTS.E.BYPASS.128")
        assert arch == "sm_90a" or kernel.count("LDSM.16.M88.4")
        assert kernel.count("LDS.128")
        if region.anchor not in CONVS:  # whose results go to planes, pixel by pixel
            assert kernel.count("STG.E.128" if launch.combine else "STG.E.64")
        elif region.outputs == ("made",):  # four channels at a time
            wide = "STG.E.128" if launch.combine else "STG.E"
            assert kernel.count("STG") == kernel.instructions[wide]


@needs_cuobjdump
@pytest.mark.parametrize(("region", "arch"), PRODUCTS, ids=names(PRODUCTS))
def test_making_operands_is_less_than_multiplying(region, arch, code):
    """What is not the product itself, in the kernel for many rows, per instruction of it."""
    kernel = code(region, arch)[cuda.launches(region, arch)[-1].symbol]
    # wgmma counts as the mma.sync that it takes the place of, one per 8 of at most 128 tokens.
    rows = min(128, cuda.launches(region, arch)[-1].block_rows)
    products = kernel.count("HMMA", "IMMA", "QMMA")
    products += kernel.count("HGMMA", "IGMMA", "QGMMA") * rows // 8
    others = kernel.count("LOP3", "HMUL2", "HFMA2", "HADD2", "PRMT", "F2FP", "LDS", "LDSM")
    assert products >= 64
    assert others < 2.5 * products


@needs_cuobjdump
@pytest.mark.parametrize(("region", "arch"), PRODUCTS, ids=names(PRODUCTS))
def test_threads_with_roles_have_mbarriers_and_their_own_registers(region, arch, code):
    last = cuda.launches(region, arch)[-1]
    kernel = code(region, arch)[last.symbol]
    has_roles = arch == "sm_90a" and region.anchor not in CONVS
    assert has_roles == ("_roles" in last.symbol)
    assert kernel.count("USETMAXREG") == (2 if has_roles else 0)
    assert (kernel.count("SYNCS") > 0) == has_roles


@needs_cuobjdump
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_depthwise_products_are_of_four_taps(arch, code):
    """Turned by 8 for 4, and loaded 4 bytes at a time, weights 16."""
    (kernel,) = code(DEPTHWISE, arch).values()
    products = kernel.count("IDP.4A.U8.S8")
    assert products >= 32
    assert kernel.count("PRMT") <= 2.5 * products
    assert kernel.count("LDG.E.128") >= 1
    assert kernel.count("LDG.E.U8", "LDG.E.S8") == 0


@needs_cuobjdump
def test_images_are_stored_16_bytes_at_a_time(code):
    (kernel,) = code(IMAGE, "sm_80").values()
    assert kernel.count("STG.E.128") == kernel.count("STG") > 0

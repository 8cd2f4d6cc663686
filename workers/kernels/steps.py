"""What a plan hands to a kernel: a record for each step, declared here once. Imports no compiler.

To add a step: a record here, and the kernel that it names. `records` says what follows from a declaration.
"""

from __future__ import annotations

from typing import NamedTuple

from workers.kernels.layout import KINDS
from workers.kernels.records import HEADER, STEPS, Address, Bytes, Code, Count, Flag, Float32, NodeIndex, Step, step

# -- elementwise -------------------------------------------------------------------------------------------------------


class Function(NamedTuple):
    """Of elements: how many sources it takes, and which parameters of its op."""

    n_sources: int
    params: tuple[str, ...] = ()


FUNCTIONS: dict[str, Function] = {
    **dict.fromkeys(("ADD", "SUB", "MUL", "DIV", "SWIGLU", "GEGLU"), Function(2)),
    "SWIGLU_OAI": Function(2, ("alpha", "limit")),
    "SCALE": Function(1, ("scale", "bias")),
    "CLAMP": Function(1, ("low", "high")),
    **dict.fromkeys(("TANH", "SILU", "GELU", "SIGMOID", "STEP", "RELU"), Function(1)),
    "XIELU": Function(1, ("alpha_n", "alpha_p", "beta", "eps")),
    "SAME": Function(1),
}
"""By the op's name; SAME is y = x. `rows` has them in vectors."""
FUNCTION_CODE = {name: code for code, name in enumerate(FUNCTIONS)}
BY_ROW = ("ADD", "SUB", "MUL", "DIV")
"""Those that `ByRow` has too."""


@step("rows.elementwise", "elementwise")
class Elementwise(Step, frozen=True, kw_only=True):
    """y = f(x, z) over rows; row r of x meets row r % z_rows of z."""

    kind: Code
    x: Address
    x_row: Bytes
    z: Address
    z_row: Bytes
    z_rows: Count
    y: Address
    y_row: Bytes
    n_rows: Count
    n: Count
    p0: Float32 = 0.0
    p1: Float32 = 0.0
    p2: Float32 = 0.0
    p3: Float32 = 0.0


@step("rows.by_row", "elementwise by row")
class ByRow(Step, frozen=True, kw_only=True):
    """y = x op z, where z has one element for each row of x, `z_step` bytes apart; row r of x meets element r % n_z."""

    kind: Code
    x: Address
    x_row: Bytes
    z: Address
    z_step: Bytes
    n_z: Count
    y: Address
    y_row: Bytes
    n_rows: Count
    n: Count


# -- rows --------------------------------------------------------------------------------------------------------------


class RowToRow(Step, frozen=True, kw_only=True):
    """Of each row another of its length."""

    x: Address
    x_row: Bytes
    y: Address
    y_row: Bytes
    n_rows: Count
    n: Count


class RowToFew(Step, frozen=True, kw_only=True):
    """Of each row a few numbers, which lie one row's behind the other's."""

    x: Address
    x_row: Bytes
    n_rows: Count
    n: Count
    y: Address


@step("rows.rms_norm", "RMS_NORM")
class RmsNorm(RowToRow, frozen=True, kw_only=True):
    """RMS_NORM, and the MUL by a row of weights behind it unless `w` is 0."""

    w: Address
    eps: Float32


@step("rows.norm", "NORM")
class Norm(RowToRow, frozen=True, kw_only=True):
    eps: Float32


@step("rows.soft_max", "SOFT_MAX")
class SoftMax(RowToRow, frozen=True, kw_only=True):
    scale: Float32


@step("rows.top_k", "TOP_K")
class TopK(RowToFew, frozen=True, kw_only=True):
    """int32 indices, [n_rows, n_top]."""

    n_top: Count


@step("rows.sum_rows", "SUM_ROWS")
class SumRows(RowToFew, frozen=True, kw_only=True):
    """One float32."""


@step("rows.argmax", "ARGMAX")
class Argmax(RowToFew, frozen=True, kw_only=True):
    """One int32 index."""


@step("rows.narrow", "to F16")
class Narrow(RowToRow, frozen=True, kw_only=True):
    """float32 to float16."""


@step("rows.widen", "from F16")
class Widen(RowToRow, frozen=True, kw_only=True):
    """float16 to float32."""


@step("rows.get_rows", "GET_ROWS")
class GetRows(Step, frozen=True, kw_only=True):
    """Rows of float32 by int32 ids, a plane of each for each plane of x."""

    x: Address
    x_row: Bytes
    x_plane: Bytes
    n_x: Count
    n: Count
    ids: Address
    id_step: Bytes
    id_row: Bytes
    y: Address
    n_ids: Count
    n_planes: Count
    node: NodeIndex


class StoreRows(Step, frozen=True, kw_only=True):
    """Rows of float32 into rows `ids` of y, which has `n_y`. `id_bytes`: 4 or 8."""

    x: Address
    x_row: Bytes
    n_rows: Count
    n: Count
    ids: Address
    id_bytes: Bytes
    y: Address
    y_row: Bytes
    n_y: Count
    node: NodeIndex


@step("rows.store_halves", "SET_ROWS")
class StoreHalves(StoreRows, frozen=True, kw_only=True):
    """As float16."""


@step("rows.store_floats", "SET_ROWS of F32")
class StoreFloats(StoreRows, frozen=True, kw_only=True):
    """As they are."""


@step("rows.store_q8", "SET_ROWS to Q8_0")
class StoreQ8(StoreRows, frozen=True, kw_only=True):
    """As Q8_0."""


@step("rows.add_id", "ADD_ID")
class AddId(Step, frozen=True, kw_only=True):
    x: Address
    x_row: Bytes
    z: Address
    z_row: Bytes
    n_z: Count
    ids: Address
    ids_row: Bytes
    n_used: Count
    y: Address
    y_row: Bytes
    n_rows: Count
    n: Count
    node: NodeIndex


@step("rows.arange", "ARANGE")
class Arange(Step, frozen=True, kw_only=True):
    start: Float32
    step: Float32
    n: Count
    y: Address


@step("rows.rope_table", "ROPE table")
class RopeTable(Step, frozen=True, kw_only=True):
    """Cosines and sines [n_tokens, half] of int32 positions 0..bound; `turn` are float64 [half + 1]."""

    positions: Address
    step: Bytes
    turn: Address
    n_tokens: Count
    half: Count
    bound: Count
    cos: Address
    sin: Address
    node: NodeIndex


@step("rows.rope", "ROPE")
class Rope(Step, frozen=True, kw_only=True):
    x: Address
    x_head: Bytes
    x_row: Bytes
    y: Address
    y_head: Bytes
    y_row: Bytes
    n_tokens: Count
    n_head: Count
    d: Count
    cos: Address
    sin: Address
    neox: Flag
    n_dims: Count


# -- states ------------------------------------------------------------------------------------------------------------


@step("scans.concat", "CONCAT")
class Concat(Step, frozen=True, kw_only=True):
    """Each row of x and behind it that of z; `_step` is from element to element."""

    x: Address
    x_step: Bytes
    x_row: Bytes
    x_plane: Bytes
    n_x: Count
    z: Address
    z_step: Bytes
    z_row: Bytes
    z_plane: Bytes
    n_z: Count
    y: Address
    n_rows: Count
    n_planes: Count


@step("scans.ssm_conv", "SSM_CONV")
class SsmConv(Step, frozen=True, kw_only=True):
    x: Address
    x_row: Bytes
    x_seq: Bytes
    w: Address
    w_row: Bytes
    y: Address
    d_conv: Count
    n_channels: Count
    n_tokens: Count
    n_seqs: Count


@step("scans.ssm_scan", "SSM_SCAN")
class SsmScan(Step, frozen=True, kw_only=True):
    """A head has `n_a` decays: one, or one for each number of its state. b and c have strides in common."""

    state: Address
    n_slots: Count
    x: Address
    x_head: Bytes
    x_token: Bytes
    x_seq: Bytes
    dt: Address
    a: Address
    n_a: Count
    b: Address
    c: Address
    group: Bytes
    token: Bytes
    seq: Bytes
    ids: Address
    y: Address
    d_state: Count
    d_head: Count
    n_head: Count
    n_group: Count
    n_tokens: Count
    n_seqs: Count
    n_states: Count
    node: NodeIndex


# -- attention ---------------------------------------------------------------------------------------------------------


@step("flash.attend", "FLASH_ATTN_EXT")
class Attend(Step, frozen=True, kw_only=True):
    """FLASH_ATTN_EXT of one sequence; of `mask`, `sinks`, `parts` 0 means none. With `parts` a `MergeParts` must follow."""

    q: Address
    q_row: Bytes
    q_head: Bytes
    d: Count
    n_tokens: Count
    n_head: Count
    k: Address
    k_row: Bytes
    k_head: Bytes
    v: Address
    v_row: Bytes
    v_head: Bytes
    d_v: Count
    n_head_kv: Count
    n_kv: Count
    mask: Address
    mask_row: Bytes
    scale: Float32
    softcap: Float32
    sinks: Address
    y: Address
    parts: Address


@step("flash.merge_parts", "FLASH_ATTN_EXT merge")
class MergeParts(Step, frozen=True, kw_only=True):
    """The second half of an attention that was split over the context."""

    d_v: Count
    n_tokens: Count
    n_head: Count
    n_kv: Count
    sinks: Address
    y: Address
    parts: Address


@step("paged.paged_attend", "PAGED_ATTN")
class PagedAttend(Step, frozen=True, kw_only=True):
    """PAGED_ATTN; of `rows`, `sinks` and `parts` 0 means none. With `parts` a `MergeParts` must follow.

    `k_q8`, `v_q8`: cells of Q8_0, else of float16. `pages` [n_sequences, n_pages] and `rows` name pages of `n_pool`.
    """

    q: Address
    q_row: Bytes
    q_head: Bytes
    d: Count
    n_tokens: Count
    n_head: Count
    k: Address
    k_row: Bytes
    k_head: Bytes
    k_q8: Flag
    v: Address
    v_row: Bytes
    v_head: Bytes
    v_q8: Flag
    d_v: Count
    n_head_kv: Count
    pages: Address
    n_pages: Count
    n_sequences: Count
    n_pool: Count
    n_seen: Address
    rows: Address
    window: Count
    scale: Float32
    softcap: Float32
    sinks: Address
    y: Address
    parts: Address
    node: NodeIndex


# -- products ----------------------------------------------------------------------------------------------------------


class Weights(Step, frozen=True, kw_only=True):
    """Rows of weights: groups of the first `n_packed` are packed, the others lie in GGUF's layout."""

    kind: Code
    w: Address
    row_bytes: Bytes
    n_rows: Count
    n_packed: Count


@step("products.quantize", "QUANTIZE")
class Quantize(Step, frozen=True, kw_only=True):
    """n columns of k float32 as blocks for a product."""

    x: Address
    x_row: Bytes
    n: Count
    k: Count
    y: Address


@step("columns.mul_mat", "MUL_MAT")
class MulMat(Weights, frozen=True, kw_only=True):
    """Rows of weights times n columns of x."""

    k: Count
    x: Address
    x_bytes: Bytes
    y: Address
    y_bytes: Bytes
    n: Count

    def title(self) -> str:
        return f"{self.op} {KINDS[self.kind].name} {self.n_rows}x{self.k}"


@step("columns.mul_mat_id", "MUL_MAT_ID")
class MulMatId(Weights, frozen=True, kw_only=True):
    """Each expert's rows times the columns that chose it."""

    k: Count
    x: Address
    x_bytes: Bytes
    y: Address
    y_bytes: Bytes
    n_experts: Count
    n_slots: Count
    ids: Address
    ids_row: Bytes
    n_used: Count
    n_tokens: Count
    node: NodeIndex

    def title(self) -> str:
        return f"{self.op} {KINDS[self.kind].name} {self.n_rows}x{self.k}"


@step("products.get_rows", "GET_ROWS of packed rows")
class GetPackedRows(Weights, frozen=True, kw_only=True):
    """Rows of weights as float32 [n_ids, n]."""

    n: Count
    ids: Address
    id_step: Bytes
    n_ids: Count
    y: Address
    node: NodeIndex


WORDS = -(-(HEADER + max(len(s.__struct_fields__) for s in STEPS)) // 8) * 8
"""int64 words from step to step: whole cache lines."""

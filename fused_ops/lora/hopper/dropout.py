"""The hash of fused_ops.lora.dropout where the kernel knows that an even feature and the next one share a register.

x hashes both features; one 16-bit half of h belongs to each. The halves, cut to 14 bits, are compared with the level as two float16 (see
dropout.py for why that is exact); the results are predicates: what is dropped is not added, NaN neither. Triton packs neighbouring
registers of a layout. Whether those hold the two values meant here depends on the kernel's layouts; the tests on a GPU check it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fused_ops.lora.dropout import FEATURE, MODULE_MULTIPLY, MULTIPLY_1

_FEATURE, _M1 = (gl.constexpr(value & 0xFFFFFFFF) for value in (FEATURE, MULTIPLY_1))
_MODULES = gl.constexpr(tuple(value & 0xFFFFFFFF for value in MODULE_MULTIPLY))

KEEPS_NONE = gl.constexpr(0x40004000)  # a level that no 14 bits reach


@gluon.jit
def pair_keys(features):
    """Return the keys of the pairs that global features belong to, uint32."""
    return (features >> 1).to(gl.uint32) * _FEATURE


@gluon.jit
def mix(b_keys, b_pairs):
    """Return the hash x of row keys and keys of pairs (uint32, of shapes that broadcast)."""
    x = (b_keys ^ b_pairs) * _M1
    return x ^ (x >> 15)


@gluon.jit
def level_of(threshold):
    """Return the level that both halves of a hash must reach to be kept, from a threshold of 1024 (int32)."""
    return (threshold.to(gl.uint32) << 4) * 0x10001


@gluon.jit
def add_kept(b_acc, b_product, b_x, level, MODULE: gl.constexpr):
    """Return b_acc plus what module MODULE keeps of b_product (float32); b_x and level uint32."""
    asm: gl.constexpr = """{
        .reg .b32 h, r;
        .reg .f32 a, b;
        .reg .pred p, q;
        shf.l.wrap.b32 r, $6, $6, 16;
        mad.lo.u32 h, $6, $10, r;
        and.b32 h, h, 0x3fff3fff;
        setp.ge.f16x2 p|q, h, $8;
        mov.f32 a, $2;
        mov.f32 b, $3;
        @p add.f32 a, $2, $4;
        @q add.f32 b, $3, $5;
        mov.f32 $0, a;
        mov.f32 $1, b;
    }"""
    multiply = gl.full([], _MODULES[MODULE], gl.uint32)
    args = [b_acc, b_product, b_x, level, multiply]
    return gl.inline_asm_elementwise(asm, "=f,=f,f,f,f,f,r,r,r,r,r,r", args, gl.float32, True, 2)

"""Coding of weights: lossless files whose size is the size on disk.

``save_weights`` writes a state dict as one safetensors file in which sparse, clustered and integer tensors are entropy-
coded; ``load_weights`` restores it bit for bit. The parts (bit packing, Huffman, asymmetric numeral systems, relative
indices, k-means) can be used on their own.
"""

from .bits import pack_bits, pack_bools, packed_size, unpack_bits, unpack_bools
from .codecs import (
    CodebookCodec,
    DeepCompressionCodec,
    IntegersCodec,
    PlanesCodec,
    RawCodec,
    SparseCodec,
    best,
)
from .file import (
    CodecChoice,
    TensorInfo,
    describe_weights,
    load_weights,
    map_weights,
    merge_zeros,
    save_weights,
    weights_layout,
    weights_size,
)
from .huffman import canonical_codes, huffman_decode, huffman_encode, huffman_lengths
from .integers import decode_integers, encode_integers
from .kmeans import Clustering, Initialization, initial_centroids, kmeans_1d
from .registry import Codec, Encoded, codec_named, encode, register_codec
from .relative_index import relative_decode, relative_encode, shared_weight_bits

__all__ = [
    "Clustering",
    "CodebookCodec",
    "Codec",
    "CodecChoice",
    "DeepCompressionCodec",
    "Encoded",
    "Initialization",
    "IntegersCodec",
    "PlanesCodec",
    "RawCodec",
    "SparseCodec",
    "TensorInfo",
    "best",
    "canonical_codes",
    "codec_named",
    "decode_integers",
    "describe_weights",
    "encode",
    "encode_integers",
    "huffman_decode",
    "huffman_encode",
    "huffman_lengths",
    "initial_centroids",
    "kmeans_1d",
    "load_weights",
    "map_weights",
    "merge_zeros",
    "pack_bits",
    "pack_bools",
    "packed_size",
    "register_codec",
    "relative_decode",
    "relative_encode",
    "save_weights",
    "shared_weight_bits",
    "unpack_bits",
    "unpack_bools",
    "weights_layout",
    "weights_size",
]

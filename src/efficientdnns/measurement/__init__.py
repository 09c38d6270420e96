"""What a network costs: multiply-accumulates, weights, bytes, memory and measured latency."""

from efficientdnns.measurement.compare import Comparison, compare_latency
from efficientdnns.measurement.latency import Latency, Runner, Speedup, measure_latency, speedup
from efficientdnns.measurement.layers import LayerTime, LayerTimes, layer_times
from efficientdnns.measurement.macs import MacCount, count_macs
from efficientdnns.measurement.memory import peak_memory
from efficientdnns.measurement.profile import Metric, Profile, ProfileRatio, profile_many
from efficientdnns.measurement.runtimes import runner
from efficientdnns.measurement.size import nonzero_parameters, parameter_count

__all__ = [
    "Comparison",
    "Latency",
    "LayerTime",
    "LayerTimes",
    "MacCount",
    "Metric",
    "Profile",
    "ProfileRatio",
    "Runner",
    "Speedup",
    "compare_latency",
    "count_macs",
    "layer_times",
    "measure_latency",
    "nonzero_parameters",
    "parameter_count",
    "peak_memory",
    "profile_many",
    "runner",
    "speedup",
]

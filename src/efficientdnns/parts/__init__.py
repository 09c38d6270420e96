"""Parts that many methods share: scores, projections, gates, quantizers, taps and connectors."""

"""The names that options may take. A test holds each to the keys of the registry that gives the names their meaning."""

from typing import Literal

# What is removed, and how it is ranked
Importance = Literal["l1", "l2", "taylor", "hessian", "bn-scale", "geometric-median", "lamp", "activation", "random"]
Scope = Literal["global", "axis", "block"]
WeightScope = Literal["global", "layer"]

# Exits
ExitPlaces = Literal["every", "own", "search"]
Head = Literal["auto", "linear", "mlp", "attention", "copy", "cascade"]
ExitRecipe = Literal[
    "distill",
    "distill-all",
    "sum",
    "weighted",
    "ramped",
    "hints",
    "teachers",
    "two-stage",
    "frozen-teacher",
    "balanced",
    "ztw",
    "meta",
]
WITHOUT_LABELS = ("distill", "distill-all", "hints", "frozen-teacher")  # recipes that learn from samples labelled -1

# Leaving at them
Rule = Literal["max-softmax", "entropy", "margin", "energy", "patience", "learned"]
ThresholdSearch = Literal["grid", "genetic", "quota", "uniform"]
RiskOf = Literal["disagreement", "accuracy-loss"]
Cost = Literal["macs", "latency"]
Fallback = Literal["final", "ensemble"]

# Gates
GateKind = Literal["gumbel", "skipnet", "blockdrop"]
GateNetwork = Literal["pooled", "ff1", "ff2", "recurrent", "policy"]

# Training
OptimizerName = Literal["adamw", "sgd"]
Precision = Literal["no", "fp16", "bf16"]

"""Multistage training: the pseudo labels of each stage, and the clustering that makes the labels of the next one."""

from mcl_kernels.stages.pseudo_labels import compose_labels
from mcl_kernels.stages.representation import ConcatEncoder, model_soup
from mcl_kernels.stages.runner import MultistageRunner
from mcl_kernels.stages.sampler import ClusterBatchSampler

__all__ = ["ClusterBatchSampler", "ConcatEncoder", "MultistageRunner", "compose_labels", "model_soup"]

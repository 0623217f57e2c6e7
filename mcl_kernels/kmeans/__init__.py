from mcl_kernels.kmeans.api import KMeans
from mcl_kernels.kmeans.assign import assign_clusters

__all__ = ["KMeans", "assign_clusters"]

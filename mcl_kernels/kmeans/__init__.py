from mcl_kernels.kmeans.api import KMeans, assign_clusters

__all__ = ["KMeans", "assign_clusters"]

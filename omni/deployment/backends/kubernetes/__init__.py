"""Manifests for Kubernetes: a Deployment or a LeaderWorkerSet for each group, the proxy, its Services, a ConfigMap."""

"""Where arrays live and who computes: sharding rules, meshes, processes, and TPU pods that need not be there."""

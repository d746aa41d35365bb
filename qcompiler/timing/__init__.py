"""Which kernel is faster where: sites timed on this machine, or estimated by a model of it."""

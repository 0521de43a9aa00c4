from hypothesis import settings

# The same examples on every run and on every machine; a busy machine is slow, not wrong.
settings.register_profile("core", deadline=None, derandomize=True, database=None)
settings.load_profile("core")

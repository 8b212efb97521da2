class _Arguments:
    disable_metadata: bool
    lowvram: bool
    novram: bool

args: _Arguments

"""What pcdet needs of easydict, which is not installed for the tests."""


class EasyDict(dict):
    """A dict whose keys are attributes too, and those of the dicts in it."""

    def __init__(self, tree=()):
        super().__init__()
        for key, value in dict(tree).items():
            self[key] = _easy(value)

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value


def _easy(value):
    if isinstance(value, dict):
        return EasyDict(value)
    return [_easy(each) for each in value] if isinstance(value, list | tuple) else value

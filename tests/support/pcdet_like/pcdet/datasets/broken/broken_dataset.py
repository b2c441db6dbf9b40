import a_package_that_nobody_has


class BrokenDataset:
    tool = a_package_that_nobody_has

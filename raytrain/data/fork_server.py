"""Imported by the fork server of loader workers alone, for what it forks: the user's code may have it do that too."""

from raytrain.storage.forks import tend_forks

tend_forks()

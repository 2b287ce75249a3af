"What a line of the command line comes to"

import shlex

from vggflow import cli


def parsed(line):
    "Arguments and settings of a line, as the function behind the verb gets them"
    name, *words = shlex.split(line)
    return cli.parse(f"vggflow {name}", cli.VERBS[name], words)

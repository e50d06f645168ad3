"""Stands in for the fresh processes that read tokenizers: forks of one that has imported transformers alone.

They would take two seconds each to import it. Run as a script, this is that one process, of any Python.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import traceback


class ForkedReaders:
    """What `megatron_periln.convert.tokens.auto_tokenizer` has of the module ``subprocess``."""

    def __init__(self):
        self._processes = {}

    def run(self, command, *, input, capture_output, text, env):
        """Do what ``subprocess.run`` does with the command that reads tokenizers."""
        python, isolated, script, *folders = command
        assert isolated == "-P" and capture_output and text
        if python not in self._processes:
            self._processes[python] = subprocess.Popen(
                [python, isolated, __file__, script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=env,
            )
        process = self._processes[python]
        print(json.dumps([folders, input]), file=process.stdin, flush=True)
        return subprocess.CompletedProcess(command, *json.loads(process.stdout.readline()))

    def close(self):
        """End the processes. Closing their pipes is not enough: what tests have forked may hold them open."""
        for process in self._processes.values():
            print("end", file=process.stdin, flush=True)
            process.wait()


def main():
    gc.disable()
    spec = importlib.util.spec_from_file_location("auto_tokenizer", sys.argv[1])
    reader = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    importlib.import_module("transformers").AutoTokenizer  # noqa: B018
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is said
    for line in sys.stdin:
        if line == "end\n":
            break
        folders, texts = json.loads(line)
        if pid := os.fork():
            os.waitpid(pid, 0)
            continue
        try:
            found = [reader.read(folder, json.loads(texts)) for folder in folders]
            answer = 0, json.dumps(found), ""
        except BaseException:
            answer = 1, "", traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()

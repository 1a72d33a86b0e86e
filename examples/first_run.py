"""Train a small model in one process, and look at everything that it leaves.

    PYTHONPATH=. .venv/bin/python examples/first_run.py

It takes about ten seconds. ``first_run.ipynb`` is the same as a notebook.
"""

import torch

import sfl

# One server and three clients in this process: each client trains conv1 to pool2 of LeNet-5 on its
# part of 4,000 digits, the server the rest. Over sockets the weights would be the same bit for bit.
# Later, sfl.open_run(run.path) opens the run again.
config = sfl.RunConfig(model="lenet5", rounds=3, batch_size=64, seed=1)
run = sfl.simulate(config, out="shared_files")

# Its figures are pandas frames: a row for each round, and one for each training step.
print(run.rounds[["round", "train_loss", "val_acc", "test_acc", "bytes_up"]])
print(run.steps.groupby(["round", "client"])[["loss", "acc"]].mean())

# Its curves; sfl.plot([run, other]) draws several runs in one picture.
loss, accuracy = run.plot()
loss.figure.savefig(run.path / "curves.png")

# The whole trained model, in evaluation mode, on its test set.
model = run.model()
right = total = 0
with torch.no_grad():
    for client in range(config.clients):
        for x, y in run.batches("test", client):
            right += int((model(x).argmax(1) == y).sum())
            total += len(y)
recorded = run.rounds["test_acc"].iloc[-1]
print(f"test accuracy: {right / total} computed now, {recorded} recorded")
assert right / total == recorded

# What the server received in client 0's third step of the second round (both count from 0), and
# which digits stand behind it: their indices in the data set follow from the seed.
steps = list(run.tensors(client=0, round=1))
step = steps[2]
behind = run.samples(step)
print(f"activations {tuple(step.activations.shape)}, labels {step.labels[:8].tolist()}, ...")
print(f"training samples {behind.indices[:8].tolist()}, ... of client_{behind.client}")
assert torch.equal(behind.y, step.labels)

# The trained model as one file, which torch opens without SFL; "onnx" is for other runtimes
# (pip install onnx onnxscript onnxruntime). Then its predictions for some digits.
done = sfl.export(run, "exported", out=run.path / "first_run.pt2")
opened = torch.export.load(done.path).module()
x, y = next(run.batches("test", client=0))
print(f"predicted {opened(x).argmax(1)[::40].tolist()} for the digits {y[::40].tolist()}")
assert torch.equal(opened(x).argmax(1), model(x).argmax(1))

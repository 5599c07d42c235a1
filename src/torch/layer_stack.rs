//! A stack of layers with optional recompute in the backward pass.
//!
//! Libtorch saves the activations that every operation of a pass needs for its gradients. Where
//! they do not fit into memory, only the input of each layer is saved, and a layer is recomputed
//! when the backward pass reaches it (Chen et al. 2016, *Training Deep Nets with Sublinear Memory
//! Cost*, arXiv 1604.06174): a third more compute for a fraction of the memory.

use tch::Tensor;

/// The activations that a pass saves for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SavedActivations {
    /// Nothing; there is no backward pass.
    Nothing,
    /// The input of each layer; the rest is recomputed.
    Inputs,
    /// Everything that each operation needs.
    Everything,
}

/// A layer as a function of its input.
pub type Layer<'a> = Box<dyn Fn(&Tensor) -> Tensor + 'a>;

/// A forward pass through a stack of layers.
pub struct LayerStack<'a> {
    links: Vec<Layer<'a>>,
    /// The inputs of all layers, or only of the first.
    inputs: Vec<Tensor>,
    /// The output with its autograd graph, if everything is saved.
    end: Tensor,
    /// The output, detached; its gradient accumulates here.
    output: Tensor,
    keep: SavedActivations,
}

impl<'a> LayerStack<'a> {
    /// Runs `links` on `xs`. Gradients propagate through `xs` into whatever it was computed from.
    pub fn run(links: Vec<Layer<'a>>, xs: &Tensor, keep: SavedActivations) -> Self {
        let through = |inputs: &mut Vec<Tensor>| {
            let mut xs = xs.shallow_clone();
            for link in &links {
                let next = link(&xs);
                if keep == SavedActivations::Inputs {
                    inputs.push(xs);
                }
                xs = next;
            }
            xs
        };
        let mut inputs = Vec::new();
        let end = match keep {
            SavedActivations::Everything => through(&mut inputs),
            SavedActivations::Nothing | SavedActivations::Inputs => {
                without_gradients(|| through(&mut inputs))
            }
        };
        let output = end
            .detach()
            .set_requires_grad(keep != SavedActivations::Nothing);
        Self {
            links,
            inputs,
            end,
            output,
            keep,
        }
    }

    /// The detached output. [`LayerStack::backward`] propagates the gradient that it accumulates
    /// back through the layers.
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// Adds to the gradients of all parameters of the layers and of the input.
    pub fn backward(self) {
        let mut gradient = self.output.grad();
        if !gradient.defined() {
            return;
        }
        match self.keep {
            SavedActivations::Nothing => {}
            SavedActivations::Everything => push_back(&self.end, &gradient),
            SavedActivations::Inputs => {
                drop((self.end, self.output));
                let mut inputs = self.inputs;
                for link in self.links.iter().skip(1).rev() {
                    let input = inputs.pop().expect("one input per layer");
                    let input = input.detach().set_requires_grad(true);
                    push_back(&link(&input), &gradient);
                    gradient = input.grad();
                }
                let first = self.links.first().expect("a layer");
                push_back(&first(&inputs[0]), &gradient);
            }
        }
    }
}

/// Runs `compute` without gradients. Unlike after [`tch::no_grad`], they are on again after a panic, such
/// as one for lack of memory.
pub fn without_gradients<T>(compute: impl FnOnce() -> T) -> T {
    let _no_grad = tch::no_grad_guard();
    compute()
}

/// Runs the backward pass from `end`, whose gradient is `gradient`.
fn push_back(end: &Tensor, gradient: &Tensor) {
    if end.requires_grad() {
        (end * gradient).sum(end.kind()).backward();
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::super::layers::tests::noise;
    use super::*;

    /// Two linear layers with a nonlinearity, applied to a doubled input; returns all gradients.
    fn gradients(keep: SavedActivations) -> [Tensor; 3] {
        let leaf = |shape: &[i64], seed| noise(shape, seed).set_requires_grad(true);
        let (xs, first, second) = (leaf(&[3, 4], 1), leaf(&[5, 4], 2), leaf(&[2, 5], 3));
        let links: Vec<Layer<'_>> = vec![
            Box::new(|xs| xs.linear(&first, None::<&Tensor>).silu()),
            Box::new(|xs| xs.linear(&second, None::<&Tensor>).silu()),
        ];
        let chain = LayerStack::run(links, &(&xs * 2.0), keep);
        (chain.output() * noise(&[3, 2], 4))
            .sum(Kind::Float)
            .backward();
        chain.backward();
        [xs, first, second].map(|leaf| leaf.grad())
    }

    #[test]
    fn computing_again_gives_the_same_gradients_as_remembering() {
        let remembered = gradients(SavedActivations::Everything);
        assert!(
            remembered
                .iter()
                .all(|gradient| gradient.abs().max().double_value(&[]) > 1e-3)
        );
        assert_eq!(gradients(SavedActivations::Inputs), remembered);
    }

    #[test]
    fn gradients_are_on_again_after_a_panic() {
        let panics = || without_gradients(|| panic!("no memory"));
        assert!(std::panic::catch_unwind(panics).is_err());
        let weight = noise(&[2], 1).set_requires_grad(true);
        assert!((weight * 2.0).requires_grad());
    }

    #[test]
    fn nothing_is_learned_without_a_history() {
        let weight = noise(&[2, 2], 1).set_requires_grad(true);
        let link: Layer<'_> = Box::new(|xs| xs.linear(&weight, None::<&Tensor>));
        let chain = LayerStack::run(vec![link], &noise(&[1, 2], 2), SavedActivations::Nothing);
        assert!(!chain.output().requires_grad());
        chain.backward();
        assert!(!weight.grad().defined());
    }
}

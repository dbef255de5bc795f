//! One text for equal names: of labels, namespaces, nodes and pods there are few different ones, said again
//! by every object. What they mean, and where objects are kept, is not here.

use std::collections::HashSet;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Labels, Object, ObjectName};

/// What is not worth going through for what is left.
const FEW: usize = 1024;

/// Shared by whoever is to hold the same text. A text that nobody else holds goes in time: names of pods
/// come and go for ever.
#[derive(Clone, Debug, Default)]
pub struct Interner {
    texts: Arc<Mutex<Texts>>,
}

#[derive(Debug, Default)]
struct Texts {
    all: HashSet<Arc<str>>,
    /// How many were left when it was last looked for those that nobody holds.
    left: usize,
}

impl Interner {
    /// Gives the object the texts that others have. One that is shared already stays as it is.
    pub fn intern(&self, object: &mut Object) {
        // No panic leaves the set half changed in a way that matters: it only saves room.
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        texts.object(object);
        texts.sweep();
    }

    /// How many texts there are.
    pub fn count(&self) -> usize {
        let texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        texts.all.len()
    }
}

impl Texts {
    fn object(&mut self, object: &mut Object) {
        match object {
            Object::Service(service) => {
                let Some(service) = Arc::get_mut(service) else {
                    return;
                };
                self.name(&mut service.id);
                if let Some(selector) = &mut service.selector {
                    self.labels(selector);
                }
            }
            Object::EndpointSlice(slice) => {
                let Some(slice) = Arc::get_mut(slice) else {
                    return;
                };
                self.name(&mut slice.id);
                if let Some(service) = &mut slice.service {
                    self.name(service);
                }
                for endpoint in &mut slice.endpoints {
                    self.optional(&mut endpoint.hostname);
                    self.optional(&mut endpoint.node);
                    self.optional(&mut endpoint.zone);
                    if let Some(pod) = &mut endpoint.pod {
                        self.name(pod);
                    }
                }
                for port in &mut slice.ports {
                    self.optional(&mut port.name);
                }
            }
            Object::Pod(pod) => {
                let Some(pod) = Arc::get_mut(pod) else {
                    return;
                };
                self.name(&mut pod.id);
                self.labels(&mut pod.labels);
                self.optional(&mut pod.node);
                self.optional(&mut pod.hostname);
                self.optional(&mut pod.subdomain);
                for port in &mut pod.ports {
                    self.optional(&mut port.name);
                }
            }
            Object::Namespace(namespace) => {
                let Some(namespace) = Arc::get_mut(namespace) else {
                    return;
                };
                self.text(&mut namespace.name);
                self.labels(&mut namespace.labels);
            }
            Object::Node(node) => {
                let Some(node) = Arc::get_mut(node) else {
                    return;
                };
                self.text(&mut node.name);
                self.labels(&mut node.labels);
            }
            Object::Policy(policy) => {
                if let Some(policy) = Arc::get_mut(policy) {
                    self.name(&mut policy.id);
                }
            }
            Object::ClusterPolicy(policy) => {
                if let Some(policy) = Arc::get_mut(policy) {
                    self.text(&mut policy.name);
                }
            }
        }
    }

    fn name(&mut self, name: &mut ObjectName) {
        self.text(&mut name.namespace);
        self.text(&mut name.name);
    }

    /// Keys cannot be changed where they are.
    fn labels(&mut self, labels: &mut Labels) {
        let pairs = mem::take(labels).into_iter();
        *labels = pairs
            .map(|(mut key, mut value)| {
                self.text(&mut key);
                self.text(&mut value);
                (key, value)
            })
            .collect();
    }

    fn optional(&mut self, text: &mut Option<Arc<str>>) {
        if let Some(text) = text {
            self.text(text);
        }
    }

    fn text(&mut self, text: &mut Arc<str>) {
        match self.all.get(text) {
            Some(same) => *text = same.clone(),
            None => {
                self.all.insert(text.clone());
            }
        }
    }

    /// Looks for what nobody holds once as many have come as were left, which is a constant for each.
    fn sweep(&mut self) {
        if self.all.len() < 2 * self.left.max(FEW) {
            return;
        }
        self.all.retain(|text| Arc::strong_count(text) > 1);
        self.left = self.all.len();
        self.all.shrink_to(2 * self.left.max(FEW));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Namespace, NamespacePhase};

    fn namespace(name: &str, team: &str) -> Object {
        Object::Namespace(Arc::new(Namespace {
            name: name.into(),
            labels: Labels::from([("team".into(), team.into())]),
            phase: NamespacePhase::Active,
            keeps_established: false,
        }))
    }

    fn parts(object: &Object) -> [&Arc<str>; 3] {
        let Object::Namespace(namespace) = object else {
            panic!("it is a namespace");
        };
        let (key, value) = namespace.labels.first_key_value().unwrap();
        [&namespace.name, key, value]
    }

    #[test]
    fn equal_texts_are_one_and_the_object_is_the_same() {
        let names = Interner::default();
        let (mut one, mut other) = (namespace("a", "red"), namespace("red", "red"));
        names.intern(&mut one);
        names.intern(&mut other);
        assert_eq!(
            (&one, &other),
            (&namespace("a", "red"), &namespace("red", "red"))
        );
        let ([_, key, red], [name, same_key, same]) = (parts(&one), parts(&other));
        assert!(Arc::ptr_eq(key, same_key) && Arc::ptr_eq(red, same) && Arc::ptr_eq(red, name));
        assert_eq!(names.count(), 3, "a, team and red");
    }

    #[test]
    fn texts_that_nobody_holds_go_however_many_come() {
        let names = Interner::default();
        let mut kept = Vec::new();
        for i in 0..50_000 {
            let mut object = namespace(&format!("n{i}"), "red");
            names.intern(&mut object);
            if i % 100 == 0 {
                kept.push(object);
            }
        }
        let count = names.count();
        assert!((kept.len()..=2 * FEW + 2).contains(&count), "{count} texts");
        let same: Vec<_> = kept.iter().map(|object| parts(object)[2]).collect();
        assert!(same.iter().all(|text| Arc::ptr_eq(text, same[0])));
    }
}

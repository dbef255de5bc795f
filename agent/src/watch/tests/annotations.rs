//! What annotations of policies mean.

use serde_json::json;

use super::decoded;
use crate::model::Object;
use crate::watch::wire;

#[test]
fn a_policy_is_audited_only_by_the_word_for_it() {
    for (word, is_audit, is_told) in [
        (json!(null), false, false),
        (json!("enforce"), false, false),
        (json!("audit"), true, false),
        // Whoever mistypes it gets the policy that stands there.
        (json!("Audit"), false, true),
        (json!(""), false, true),
    ] {
        let annotations = json!({"weir.local/enforcement": word});
        let metadata = json!({"namespace": "a", "name": "p", "annotations": annotations});
        let spec = json!({"podSelector": {}});
        let text = json!({"metadata": metadata, "spec": spec});
        let found = decoded::<wire::NetworkPolicy>(&text).1.unwrap();
        let Some(Object::Policy(policy)) = found.object else {
            panic!("{text} is a policy");
        };
        assert_eq!(policy.is_audit, is_audit, "{text}");
        assert_eq!(!found.problems.is_empty(), is_told, "{text}");
        let spec = json!({
            "tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
            "ingress": [{"action": "Deny", "from": [{"namespaces": {}}]}],
        });
        let text = json!({"metadata": metadata, "spec": spec});
        let found = decoded::<wire::ClusterNetworkPolicy>(&text).1.unwrap();
        let Some(Object::ClusterPolicy(policy)) = found.object else {
            panic!("{text} is a policy");
        };
        assert_eq!(policy.is_audit, is_audit, "{text}");
        assert_eq!(!found.problems.is_empty(), is_told, "{text}");
        // What is not understood is as open or closed as the whole.
        let spec = json!({"podSelector": {}, "new": 1});
        let text = json!({"metadata": metadata, "spec": spec});
        let closed = decoded::<wire::NetworkPolicy>(&text).1.unwrap_err().closed;
        let Some(Object::Policy(policy)) = closed else {
            panic!("{text} is a policy");
        };
        assert_eq!(policy.is_audit, is_audit, "{text}");
    }
}

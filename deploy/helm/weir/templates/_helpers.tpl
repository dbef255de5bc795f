{{- define "weir.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* What an object is chosen by. It never changes: a selector of a DaemonSet cannot. */ -}}
{{- define "weir.selector" -}}
app.kubernetes.io/name: {{ .name }}
{{- end }}

{{- /* Of pods: without versions, so that only what changes a pod starts it anew. */ -}}
{{- define "weir.podLabels" -}}
{{ include "weir.selector" . }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: weir
{{- with .root.Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "weir.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "weir.selector" . }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: weir
{{- end }}

{{- /* The API servers, each as an argument. IPv6 needs brackets in a URL. */ -}}
{{- define "weir.apiServers" -}}
{{- if .Values.kubeApiServers }}
{{- range .Values.kubeApiServers }}
- --kube-api-server={{ . }}
{{- end }}
{{- else }}
{{- $why := "k8sServiceHost is not set: say where a node reaches the API server (an address, or a name that nodes resolve without cluster DNS), or list URLs in kubeApiServers. The Service `kubernetes` cannot be used: Weir itself makes it work" }}
{{- $host := required $why .Values.k8sServiceHost }}
{{- if contains ":" $host }}{{ $host = printf "[%s]" $host }}{{ end }}
- --kube-api-server=https://{{ $host }}:{{ .Values.k8sServicePort }}
{{- end }}
{{- end }}

{{- /* Where metrics and probes are served. Kubelet puts the address in when the container starts, without
brackets also if it is IPv6: the programs take that. */ -}}
{{- define "weir.host" -}}
{{- if .Values.prometheus.enabled }}$(HOST_IP){{ else }}127.0.0.1{{ end -}}
{{- end }}

{{- define "weir.probe" -}}
httpGet:
  {{- if not .root.Values.prometheus.enabled }}
  host: 127.0.0.1
  {{- end }}
  path: {{ .path }}
  port: {{ .port }}
{{- end }}

{{- define "weir.scheduling" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
priorityClassName: {{ .Values.priorityClassName }}
terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

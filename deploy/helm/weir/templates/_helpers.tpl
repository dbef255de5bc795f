{{- define "weir.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "weir.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: weir
{{- end }}

{{- /* An address with a port. IPv6 needs brackets. */ -}}
{{- define "weir.apiServer" -}}
{{- $host := .Values.k8sServiceHost -}}
{{- if contains ":" $host }}{{ $host = printf "[%s]" $host }}{{ end -}}
https://{{ $host }}:{{ .Values.k8sServicePort }}
{{- end }}

{{- /* Where metrics and probes are served. */ -}}
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
